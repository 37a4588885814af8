"""CLP: Zheng, Tang, Li & Liu, *Data-free Backdoor Removal based on Channel Lipschitzness*, ECCV 2022.

A channel that reacts to a trigger changes its output much for a small change of its input. Its Lipschitz constant is
bounded by the spectral norm of its filter times the scale of the BatchNorm after it; channels whose bound is an outlier
in their layer are pruned. Clean images play no part: one is only passed through to see which layers follow which.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from defenses.defense import CleanImages, Defense, RepairLoop
from engine.drive import UNTRAINED_REMEDY
from utils.config import Range, setting
from utils.errors import InputError

COLUMNS = {
    "layers": "6d",
    "pruned": "6d",
    "C-Acc %": "7.2f",
    "ASR %": "7.2f",
    "seconds": "8.0f",
}


@torch.no_grad()
def followed_by_batchnorm(network: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Return each convolution whose output goes straight into a BatchNorm with scale, and that BatchNorm, by name.

    Args:
        network: in eval mode.
        images: the network's input, float (B, ...).

    Raises:
        InputError: there is no such pair.
    """
    outputs: dict[int, tuple[str, Tensor]] = {}  # by id; kept alive, so that an id means one tensor
    pairs: dict[str, str] = {}

    def after(name: str) -> Any:
        return lambda layer, inputs, output: outputs.update({id(output): (name, output)})

    def before(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple) -> None:
            if id(inputs[0]) in outputs:
                pairs[outputs[id(inputs[0])][0]] = name

        return hook

    with ExitStack() as hooks:
        for name, layer in network.named_modules():
            if isinstance(layer, _ConvNd) and not layer.transposed:
                hooks.enter_context(layer.register_forward_hook(after(name)))
            elif isinstance(layer, _BatchNorm) and layer.weight is not None and layer.running_var is not None:
                hooks.enter_context(layer.register_forward_pre_hook(before(name)))
        network(images)
    if not pairs:
        raise InputError("CLP needs convolutions that are followed by a BatchNorm with scale; this network has none")
    return list(pairs.items())


@torch.no_grad()
def lipschitz_bounds(convolution: _ConvNd, norm: _BatchNorm) -> Tensor:
    """Return the bound on the Lipschitz constant of every channel: float32 (C,).

    It is the largest singular value of the filter, reshaped to (channels in, places), times |gamma / sqrt(var + eps)|.
    """
    weight = convolution.weight.float().flatten(2)  # (C, channels in, places)
    scale = (norm.weight.float() / (norm.running_var.float() + norm.eps).sqrt()).abs()  # (C,)
    return torch.linalg.matrix_norm(weight, ord=2) * scale


class ChannelLipschitzLoop(RepairLoop):
    """One step for each convolution with its BatchNorm."""

    title, unit, columns, remedy = "layers", "layer", COLUMNS, UNTRAINED_REMEDY

    def __init__(self, network: nn.Module, clean: CleanImages, config: "ChannelLipschitz"):
        super().__init__(network, clean, config)
        images, _ = next(clean.batches())
        self.pairs = followed_by_batchnorm(self.network.eval(), images[:2])
        self.total, self.pruned = len(self.pairs), 0

    @torch.no_grad()
    def steps(self) -> Iterator[int]:
        """See ``engine.drive.Loop``."""
        for convolution, norm in self.pairs[self.done :]:
            norm = self.network.get_submodule(norm)
            bounds = lipschitz_bounds(self.network.get_submodule(convolution), norm)
            outliers = bounds > bounds.mean() + self.config.u * bounds.std()  # (C,)
            for part in (norm.weight, norm.bias):
                part[outliers] = 0
            self.pruned += int(outliers.sum())
            self.done += 1
            yield self.done

    def due(self) -> bool:
        """A row belongs at the beginning and at the end."""
        return self.done in (0, self.total)

    def row(self) -> dict[str, Any]:
        """Return how many channels were pruned in how many layers."""
        return {"layers": self.done, "pruned": self.pruned}

    def found(self) -> dict[str, Any]:
        """See ``RepairLoop``."""
        return {"pruned_neurons": self.pruned}

    def state_dict(self) -> dict[str, Any]:
        """See ``engine.drive.Loop``."""
        return {"done": self.done, "pruned": self.pruned, "network": self.network.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``engine.drive.Loop``."""
        self.done, self.pruned = state["done"], state["pruned"]
        self.network.load_state_dict(state["network"])


@dataclass(frozen=True)
class ChannelLipschitz(Defense):
    """Channel Lipschitzness based pruning."""

    title: ClassVar[str] = "CLP"
    loop: ClassVar[type[RepairLoop]] = ChannelLipschitzLoop
    milder: ClassVar[str] = "raise --clp-u"
    u: float = setting(
        3.0, "standard deviations above its layer's mean at which a channel is pruned", Range(0), "--clp-u"
    )
