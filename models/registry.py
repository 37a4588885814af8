"""One table of the networks that can be built by name."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from models.mobilenetv2 import MobileNetV2
from models.own import build_own
from models.preact_resnet import preactresnet18
from models.resnet import resnet18, resnet34, resnet50, resnet101, resnet152
from models.vgg import vgg19_bn
from utils.config import Config, InputCode, Range, code, setting

ARCHITECTURES = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "preactresnet18": preactresnet18,
    "vgg19_bn": vgg19_bn,
    "MobileNetV2": MobileNetV2,
}


@dataclass(frozen=True)
class ModelConfig(Config):
    """Which network."""

    arch: str = setting("resnet18", "network", choices=ARCHITECTURES)
    widen_factor: float = setting(1.0, "multiplies all channel counts", Range(0, 64, open_low=True))
    model: InputCode | None = setting(
        None,
        "a network of your own instead: the function is called with num_classes, and returns a torch.nn.Module",
        metavar="FILE.py:FUNCTION",
        kind=code,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.model and (self.arch, self.widen_factor) != (ModelConfig.arch, ModelConfig.widen_factor):
            raise ValueError("--model builds the network itself: leave out --arch and --widen-factor")

    def build(self, num_classes: int) -> nn.Module:
        """Build the network; raises ``InputError`` as ``build_own`` and ``ValueError`` as ``build_model``."""
        if self.model:
            return build_own(self.model, num_classes)
        return build_model(self.arch, num_classes, self.widen_factor)

    def entries(self) -> dict[str, Any]:
        """Return what a model card says of it."""
        if self.model:
            return {"model": f"{self.model.path.name}:{self.model.function}"}
        return {"arch": self.arch, "widen_factor": self.widen_factor}

    def __str__(self) -> str:
        return self.model or f"{self.arch}, width {self.widen_factor}"


def build_model(arch: str, num_classes: int = 10, widen_factor: float = 1.0) -> nn.Module:
    """Build a network for small RGB images by its name.

    Args:
        arch: a key of ``ARCHITECTURES``.
        num_classes: number of outputs, at least 1.
        widen_factor: multiplies every channel count, above 0; 1.0 is the published width.

    Shape:
        The network maps float (B, 3, H, W), normalised, to float logits (B, num_classes); published for H = W = 32.

    Raises:
        ValueError: the name is unknown, or a number is out of range.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; choose from {', '.join(ARCHITECTURES)}")
    if not widen_factor > 0:
        raise ValueError(f"widen_factor must be above 0, got {widen_factor}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return ARCHITECTURES[arch](num_classes=num_classes, widen_factor=widen_factor)
