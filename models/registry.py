"""One table of the networks that can be built by name."""

from torch import nn

from models.mobilenetv2 import MobileNetV2
from models.resnet import resnet18, resnet34, resnet50, resnet101, resnet152
from models.vgg import vgg19_bn

ARCHITECTURES = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
    "vgg19_bn": vgg19_bn,
    "MobileNetV2": MobileNetV2,
}


def build_model(arch: str, num_classes: int = 10, widen_factor: float = 1.0) -> nn.Module:
    """Build a network for 32x32 RGB images by its name.

    Args:
        arch: a key of ``ARCHITECTURES``.
        num_classes: number of outputs, at least 1.
        widen_factor: multiplies every channel count, above 0; 1.0 is the published width.

    Shape:
        The network maps float (B, 3, 32, 32), normalised, to float logits (B, num_classes).

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
