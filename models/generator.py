"""The generator of the input-aware attack (Nguyen & Tran, NeurIPS 2020): an image in, an image of the same size out."""

from torch import Tensor, nn


def _block(in_channels: int, out_channels: int, relu: bool = True) -> list[nn.Module]:
    layers = [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels, momentum=0.05)]
    return [*layers, nn.ReLU(inplace=True)] if relu else layers


class Generator(nn.Module):
    """Three stages down, a middle, three stages up; no skip connections.

    Args:
        out_channels: 3 for patterns, 1 for masks.

    Shape:
        float (B, 3, H, W), normalised -> float (B, out_channels, H, W), -inf..inf; H and W are multiples of 8.
    """

    def __init__(self, out_channels: int):
        super().__init__()
        down, up = [], []
        for before, after in ((3, 32), (32, 64), (64, 128)):
            down += [*_block(before, after), *_block(after, after), nn.MaxPool2d(2)]
        for before, after in ((128, 64), (64, 32)):
            up += [nn.Upsample(scale_factor=2, mode="bilinear"), *_block(before, before), *_block(before, after)]
        up += [nn.Upsample(scale_factor=2, mode="bilinear"), *_block(32, 32), *_block(32, out_channels, relu=False)]
        self.layers = nn.Sequential(*down, *_block(128, 128), *up)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
