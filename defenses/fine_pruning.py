"""FP, fine-pruning: Liu, Dolan-Gavitt & Garg, *Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural
Networks*, RAID 2018.

Neurons of the last convolutional layer that clean images hardly activate are pruned, from the least active on, as long
as the accuracy on the clean images stays within a tolerance. What is left is fine-tuned. Here they are the neurons of
the last BatchNorm that runs, or of what a network without any has instead (``models.neuron_layers``).
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from defenses.defense import CleanImages
from defenses.tuning import COLUMNS, TuningConfig, TuningLoop
from engine.runtime import autocast
from models.neuron_layers import ends_with_channels, neuron_layers
from utils.config import Range, setting
from utils.errors import InputError


@torch.no_grad()
def last_activations(network: nn.Module, clean: CleanImages, precision: torch.dtype) -> tuple[str, Tensor]:
    """Return the last layer with neurons that makes feature maps, and the mean activation of each of its channels.

    An activation is ReLU of the layer's output, averaged over images and places: (C,), float64.

    Raises:
        InputError: no layer with neurons makes feature maps.
    """
    network.eval()
    layers = neuron_layers(network)
    sums: dict[str, Tensor] = {}
    order: list[str] = []  # in which the layers of feature maps run

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
            if output.dim() == 4:
                maps = output.movedim(-1, 1) if ends_with_channels(layer, output) else output  # (B, C, H, W)
                active = maps.relu().double().mean((2, 3)).sum(0)  # (C,)
                sums[name] = sums.get(name, 0) + active
                order.append(name)

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(watch(name)))
        for inputs, _ in clean.batches():
            with autocast(inputs.device, precision):
                network(inputs)
    if not order:
        raise InputError("fine-pruning needs a layer with neurons that makes feature maps (B, C, H, W); there is none")
    return order[-1], sums[order[-1]] / len(clean)


class FinePruningLoop(TuningLoop):
    """First one step for each channel of the layer, in which it is tried or passed over; then the fine-tuning."""

    columns: ClassVar[dict[str, str]] = {"pruned": "6d", **COLUMNS}

    def __init__(self, network: nn.Module, clean: CleanImages, config: "FinePruning"):
        super().__init__(network, clean, config)
        self.layer, activations = last_activations(self.network, clean, config.precision)
        self.order = activations.argsort(stable=True).tolist()  # least active first
        self.before, self.total = len(self.order), len(self.order) + config.iterations
        self.unpruned = clean.accuracy(self.network, config.precision)
        self.pruned = 0

    def due(self) -> bool:
        """See ``TuningLoop``; another row belongs between pruning and tuning."""
        return self.done == self.before or super().due()

    def steps(self) -> Iterator[int]:
        """See ``engine.drive.Loop``."""
        while self.done < self.before:
            if self.done == self.pruned and self._prune(self.order[self.done]):
                self.pruned += 1
            self.done += 1
            yield self.done
        yield from self.tuning_steps()

    def row(self) -> dict[str, Any]:
        """See ``TuningLoop``."""
        return {"pruned": self.pruned, **super().row()}

    @torch.no_grad()
    def _prune(self, channel: int) -> bool:
        """Prune a channel, unless that costs more than the tolerance: then put it back and return False."""
        layer = self.network.get_submodule(self.layer)
        parts = [part for part in (layer.weight, layer.bias) if part is not None]
        before = [part[channel].clone() for part in parts]
        for part in parts:
            part[channel] = 0
        accuracy = self.clean.accuracy(self.network, self.config.precision)
        if self.unpruned - accuracy <= self.config.tolerance / 100 + 1e-9:
            return True
        for part, value in zip(parts, before, strict=True):
            part[channel] = value
        return False

    def found(self) -> dict[str, Any]:
        """See ``RepairLoop``."""
        return {"layer": self.layer, "pruned_neurons": self.pruned}

    def state_dict(self) -> dict[str, Any]:
        """See ``engine.drive.Loop``."""
        return {**super().state_dict(), "pruned": self.pruned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``engine.drive.Loop``."""
        super().load_state_dict(state)
        self.pruned = state["pruned"]


@dataclass(frozen=True)
class FinePruning(TuningConfig):
    """Fine-pruning; the tolerance is in percentage points of accuracy on the defender's own images."""

    title: ClassVar[str] = "FP"
    loop: ClassVar[type[TuningLoop]] = FinePruningLoop
    milder: ClassVar[str] = "lower --fp-tolerance or --lr"
    tolerance: float = setting(
        4.0,
        "accuracy that pruning may cost on the defender's clean images, in percentage points",
        Range(0, 100),
        flag="--fp-tolerance",
    )
