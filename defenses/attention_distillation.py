"""NAD: Li, Lyu, Koren, Lyu, Li & Ma, *Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural
Networks*, ICLR 2021.

A fine-tuned copy of the network teaches the network itself where to look. In each of the last three stages the maps of
attention, A = sum over channels of |features|^2, divided by their L2 norm, are to be alike. The weights beta are those
of the authors' release, which takes the mean of the squared differences where the paper writes their sum.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.defense import CleanImages
from defenses.tuning import TuningConfig, TuningLoop
from engine.runtime import autocast
from models.neuron_layers import ends_with_channels
from utils.config import Range, setting
from utils.errors import InputError

STAGES = 3
SMALLEST = 1e-6  # norm by which a map is divided


def attention(features: Tensor) -> Tensor:
    """Return the normalised map of attention: float (B, C, H, W) -> float32 (B, H * W) of L2 norm 1."""
    return F.normalize(features.float().square().sum(1).flatten(1), eps=SMALLEST)


@contextmanager
def watched(network: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Lend a dict that holds what the modules of these names returned last, while the block runs the network."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: outputs.update({name: output})

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(network.get_submodule(name).register_forward_hook(keep(name)))
        yield outputs


@torch.no_grad()
def stages(network: nn.Module, images: Tensor) -> list[str]:
    """Return the modules whose outputs end the last three stages.

    A stage is what works at one height and width; the last module to return feature maps of that size ends it. Maps of
    one pixel, as after global pooling, are no stage: their normalised attention is constant. Modules that run more than
    once, such as a shared ReLU, end none.

    Args:
        network: in eval mode.
        images: the network's input, float (B, ...).

    Raises:
        InputError: nothing in the network returns feature maps, or channels come last in some.
    """
    calls: list[tuple[str, tuple[int, int] | None]] = []  # of modules, with height and width of what they returned

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            maps = isinstance(output, Tensor) and output.dim() == 4 and output[0, 0].numel() > 1
            if maps and ends_with_channels(module, output):
                raise InputError(f"NAD needs feature maps (B, C, H, W); {name} returns (B, H, W, C)")
            calls.append((name, tuple(output.shape[2:]) if maps else None))

        return hook

    with ExitStack() as hooks:
        for name, module in network.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(note(name)))
        network(images)
    times = Counter(name for name, _ in calls)
    last: dict[tuple[int, int], str] = {}  # in the order in which stages end
    for name, size in calls:
        if size and times[name] == 1:
            last.pop(size, None)
            last[size] = name
    if not last:
        raise InputError("NAD needs feature maps (B, C, H, W) of more than one pixel; this network has none")
    return list(last.values())[-STAGES:]


class AttentionDistillationLoop(TuningLoop):
    """First the fine-tuning of the teacher, then that of the student, ``network``."""

    def __init__(self, network: nn.Module, clean: CleanImages, config: "AttentionDistillation"):
        self.teacher_loop = TuningLoop(network, clean, config.fine_tuning(config.teacher_iterations))
        super().__init__(network, clean, config, before=config.teacher_iterations)
        self.stages = stages(self.network.eval(), next(clean.batches())[0][:2])

    def steps(self) -> Iterator[int]:
        """See ``engine.drive.Loop``."""
        for _ in self.teacher_loop.steps():
            self.done += 1
            yield self.done
        self.teacher_loop.network.requires_grad_(False).eval()
        yield from self.tuning_steps()

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See ``TuningLoop``: cross entropy, and beta times the mean squared distance of the maps of each stage."""
        with watched(self.teacher_loop.network, self.stages) as taught, autocast(self.device, self.config.precision):
            self.teacher_loop.network(images)
        with watched(self.network, self.stages) as learnt:
            logits = self.forward(images)
        loss = F.cross_entropy(logits, labels)
        for name, beta in zip(self.stages, self.config.beta[-len(self.stages) :], strict=True):
            loss = loss + beta * F.mse_loss(attention(learnt[name]), attention(taught[name]))
        return loss, logits

    def found(self) -> dict[str, Any]:
        """See ``RepairLoop``."""
        return {"stages": self.stages}

    def state_dict(self) -> dict[str, Any]:
        """See ``engine.drive.Loop``."""
        return {**super().state_dict(), "teacher": self.teacher_loop.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``engine.drive.Loop``."""
        super().load_state_dict(state)
        self.teacher_loop.load_state_dict(state["teacher"])


@dataclass(frozen=True)
class AttentionDistillation(TuningConfig):
    """Neural attention distillation; 40 updates of the teacher are 10 epochs of 500 images."""

    title: ClassVar[str] = "NAD"
    loop: ClassVar[type[TuningLoop]] = AttentionDistillationLoop
    teacher_iterations: int = setting(
        40, "updates of the teacher, the network fine-tuned", Range(1, 1e9), "--nad-teacher-iter"
    )
    beta: tuple[float, ...] = setting(
        (500.0, 1000.0, 1000.0),
        "weight of the mean squared distance of two maps of attention, in each of the last three stages",
        Range(0),
        "--nad-beta",
        "X",
    )

    def __post_init__(self):
        super().__post_init__()
        if len(self.beta) != STAGES:
            raise ValueError(f"--nad-beta: {len(self.beta)} values, expected one for each of {STAGES} stages")
