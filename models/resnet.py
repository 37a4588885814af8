"""ResNets for 32x32 images (He et al., CVPR 2016, section 4.2 input size with the ImageNet stage layout).

3x3 stem, no max-pool, four stages, average pool over the last map (4x4). Parameter names are those of the
ANP release, so its checkpoints load unchanged.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from models.width import widen


class Shortcut(nn.Sequential):
    """1x1 convolution and BatchNorm where the shape changes, else nothing."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        if stride == 1 and in_channels == out_channels:
            super().__init__()
            return
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        traced = not isinstance(x, Tensor)  # a symbol of torch.fx
        if traced or not (self.training and len(self) and self._overflows(x)):
            return super().forward(x)
        convolution, norm = self
        step = convolution.stride[0]
        return norm(F.conv2d(x[:, :, ::step, ::step], convolution.weight))  # the same numbers

    def _overflows(self, x: Tensor) -> bool:
        """Say whether oneDNN might write beyond its memory for the gradient of the weights.

        It does so for strided 1x1 convolutions, channels last, of fewer channels than its registers hold
        (https://github.com/uxlfoundation/oneDNN/issues/6035): on AVX2 always, on AVX-512 where images are large.
        """
        channels, large = x.shape[1], x.shape[2] * x.shape[3] > 32 * 32
        return x.device.type == "cpu" and self[0].stride[0] > 1 and (channels < 8 or (channels < 16 and large))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = Shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and a shortcut; the output is four times as wide."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = Shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """Four stages of residual blocks.

    Shape:
        float (B, 3, H, W), normalised -> float logits (B, num_classes).
    """

    def __init__(self, block: type[nn.Module], depths: list[int], num_classes: int, widen_factor: float):
        super().__init__()
        widths = [widen(width, widen_factor) for width in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        in_channels = widths[0]
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            blocks = []
            for index in range(depth):
                stride = 2 if index == 0 and number > 1 else 1
                blocks.append(block(in_channels, width, stride))
                in_channels = block.expansion * width
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (B, C, H, W)
        out = self.layer2(self.layer1(out))  # (B, 2C, H/2, W/2)
        out = self.layer4(self.layer3(out))  # (B, 8C, H/8, W/8)
        return self.linear(F.avg_pool2d(out, out.shape[2:]).flatten(1))


def _builder(name: str, block: type[nn.Module], depths: list[int]) -> Callable[..., ResNet]:
    def build(num_classes: int = 10, widen_factor: float = 1.0) -> ResNet:
        return ResNet(block, depths, num_classes, widen_factor)

    build.__name__ = name
    build.__doc__ = f"Build {name} for 32x32 images; arguments as in ``models.build_model``."
    return build


resnet18 = _builder("resnet18", BasicBlock, [2, 2, 2, 2])
resnet34 = _builder("resnet34", BasicBlock, [3, 4, 6, 3])
resnet50 = _builder("resnet50", Bottleneck, [3, 4, 6, 3])
resnet101 = _builder("resnet101", Bottleneck, [3, 4, 23, 3])
resnet152 = _builder("resnet152", Bottleneck, [3, 8, 36, 3])
