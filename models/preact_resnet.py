"""Pre-activation ResNet-18 for 32x32 images (He et al., *Identity Mappings in Deep Residual Networks*, ECCV 2016).

Parameter names are those of BackdoorBench and of the input-aware release, so their checkpoints load unchanged.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.width import widen


class PreActBlock(nn.Module):
    """Twice BatchNorm, ReLU and 3x3 convolution; a convolution in the shortcut sees the activated input."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.has_convolution = stride != 1 or in_channels != channels
        self.shortcut = nn.Sequential()
        if self.has_convolution:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        kept = self.shortcut(active) if self.has_convolution else x
        return kept + self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))


class PreActResNet(nn.Module):
    """Four stages of two blocks. Neither the stem nor the end has a BatchNorm.

    Shape:
        float (B, 3, H, W), normalised -> float logits (B, num_classes).
    """

    def __init__(self, num_classes: int, widen_factor: float):
        super().__init__()
        widths = [widen(width, widen_factor) for width in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        for number, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False), start=1):
            first = PreActBlock(before, width, 2 if number > 1 else 1)
            setattr(self, f"layer{number}", nn.Sequential(first, PreActBlock(width, width, 1)))
        self.linear = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer2(self.layer1(self.conv1(x)))  # (B, 2C, H/2, W/2)
        out = self.layer4(self.layer3(out))  # (B, 8C, H/8, W/8)
        return self.linear(F.avg_pool2d(out, out.shape[2:]).flatten(1))


def preactresnet18(num_classes: int = 10, widen_factor: float = 1.0) -> PreActResNet:
    """Build the pre-activation ResNet-18; arguments as in ``models.build_model``."""
    return PreActResNet(num_classes, widen_factor)
