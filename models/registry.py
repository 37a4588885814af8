"""One table of the networks that can be built by name."""

from dataclasses import dataclass

from torch import nn

from models.mobilenetv2 import MobileNetV2
from models.resnet import resnet18, resnet34, resnet50, resnet101, resnet152
from models.vgg import vgg19_bn
from utils.config import Config, Range, setting

ARCHITECTURES = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "vgg19_bn": vgg19_bn,
    "MobileNetV2": MobileNetV2,
}


@dataclass(frozen=True)
class ModelConfig(Config):
    """Which network."""

    arch: str = setting("resnet18", "network", choices=ARCHITECTURES)
    widen_factor: float = setting(1.0, "multiplies all channel counts", Range(0, 64, open_low=True))


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
