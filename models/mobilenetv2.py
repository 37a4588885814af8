"""MobileNetV2 for 32x32 images (Sandler et al., CVPR 2018, table 2, with smaller strides)."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.width import widen

# expansion, output channels, blocks, stride of the first block; the second stage has stride 1 for 32x32 input
STAGES = [(1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


class InvertedResidual(nn.Module):
    """Expand with 1x1, filter with depthwise 3x3, project with 1x1; a shortcut wherever the stride is 1."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int):
        super().__init__()
        hidden = expansion * in_channels
        self.has_shortcut = stride == 1
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if self.has_shortcut and in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return out + self.shortcut(x) if self.has_shortcut else out


class MobileNetV2(nn.Module):
    """Seventeen inverted residual blocks; arguments as in ``models.build_model``.

    Shape:
        float (B, 3, H, W), normalised -> float logits (B, num_classes).
    """

    def __init__(self, num_classes: int = 10, widen_factor: float = 1.0):
        super().__init__()
        in_channels = widen(32, widen_factor)
        self.conv1 = nn.Conv2d(3, in_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        layers = []
        for expansion, width, blocks, first_stride in STAGES:
            out_channels = widen(width, widen_factor)
            for index in range(blocks):
                stride = first_stride if index == 0 else 1
                layers.append(InvertedResidual(in_channels, out_channels, expansion, stride))
                in_channels = out_channels
        self.layers = nn.Sequential(*layers)
        last_channels = widen(1280, widen_factor)
        self.conv2 = nn.Conv2d(in_channels, last_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last_channels)
        self.linear = nn.Linear(last_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.layers(out)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)  # (B, C, H/8, W/8)
        return self.linear(F.avg_pool2d(out, out.shape[2:]).flatten(1))
