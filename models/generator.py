"""The generator of the input-aware attack (Nguyen & Tran, NeurIPS 2020): an image in, an image of the same size out."""

import torch
from torch import Tensor, nn

from models.width import widen


def _block(in_channels: int, out_channels: int, relu: bool = True) -> list[nn.Module]:
    layers = [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels, momentum=0.05)]
    return [*layers, nn.ReLU(inplace=True)] if relu else layers


def doubled(x: Tensor) -> Tensor:
    """Double height and width as ``nn.Upsample(scale_factor=2, mode="bilinear")`` does, to rounding.

    Every new pixel lies a quarter of the way from an old one to its neighbour; at the edge that is the pixel itself.
    Slices, unlike PyTorch's own kernel, have a deterministic gradient on CUDA.

    Shape:
        float (B, C, H, W) -> float (B, C, 2 * H, 2 * W).
    """
    for dim in (2, 3):
        size = x.shape[dim]
        before = torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 0, size - 1)], dim)
        after = torch.cat([x.narrow(dim, 1, size - 1), x.narrow(dim, size - 1, 1)], dim)
        x = torch.stack([x.lerp(before, 0.25), x.lerp(after, 0.25)], dim + 1).flatten(dim, dim + 1)
    return x.contiguous(memory_format=torch.channels_last)


class _Upsample(nn.Upsample):
    """Doubles height and width; on the CPU with PyTorch's own kernel, which is the faster one there."""

    def __init__(self):
        super().__init__(scale_factor=2, mode="bilinear")

    def forward(self, x: Tensor) -> Tensor:
        return doubled(x) if x.device.type == "cuda" else super().forward(x)


class Generator(nn.Module):
    """Three stages down, a middle, three stages up; no skip connections.

    Args:
        out_channels: 3 for patterns, 1 for masks.
        widen_factor: multiplies the published channel counts.

    Shape:
        float (B, 3, H, W), normalised -> float (B, out_channels, H, W), -inf..inf; H and W are multiples of 8.
    """

    def __init__(self, out_channels: int, widen_factor: float = 1.0):
        super().__init__()
        low, middle, high = (widen(channels, widen_factor) for channels in (32, 64, 128))
        down, up = [], []
        for before, after in ((3, low), (low, middle), (middle, high)):
            down += [*_block(before, after), *_block(after, after), nn.MaxPool2d(2)]
        for before, after in ((high, middle), (middle, low)):
            up += [_Upsample(), *_block(before, before), *_block(before, after)]
        up += [_Upsample(), *_block(low, low), *_block(low, out_channels, relu=False)]
        self.layers = nn.Sequential(*down, *_block(high, high), *up)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def pattern_of(output: Tensor) -> Tensor:
    """Squash the pattern generator's output to pixels: float (B, 3, H, W) -> (B, 3, H, W), 0..1."""
    return torch.tanh(output) / 2 + 0.5


def mask_of(output: Tensor) -> Tensor:
    """Squash the mask generator's output to nearly 0 or 1: float (B, 1, H, W) -> (B, 1, H, W), 0..1."""
    return torch.tanh(20 * pattern_of(output) - 10) / 2 + 0.5
