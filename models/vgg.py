"""VGG-19 with BatchNorm for 32x32 images (Simonyan & Zisserman, ICLR 2015, configuration E)."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.width import widen

LAYOUT = [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"]


class VGG(nn.Module):
    """Convolution, BatchNorm and ReLU sixteen times, five max-pools, one linear classifier.

    The average pool before it changes nothing at 32x32, where the last map is a single pixel.

    Shape:
        float (B, 3, H, W), normalised -> float logits (B, num_classes).
    """

    def __init__(self, num_classes: int, widen_factor: float):
        super().__init__()
        layers, in_channels = [], 3
        for entry in LAYOUT:
            if entry == "M":
                layers.append(nn.MaxPool2d(2))
                continue
            channels = widen(entry, widen_factor)
            layers += [
                nn.Conv2d(in_channels, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
            in_channels = channels
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)  # (B, C, H/32, W/32)
        return self.classifier(F.avg_pool2d(out, out.shape[2:]).flatten(1))


def vgg19_bn(num_classes: int = 10, widen_factor: float = 1.0) -> VGG:
    """Build VGG-19 with BatchNorm; arguments as in ``models.build_model``."""
    return VGG(num_classes, widen_factor)
