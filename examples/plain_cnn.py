"""A network without BatchNorm for the three scripts, as an example of ``--model FILE.py:FUNCTION``.

A CPU minute, nothing to download:
    python train_backdoor_cifar.py --model examples/plain_cnn.py:plain_cnn --dataset synthetic --epoch 10 \\
        --batch-size 64 --lr 0.05 --lr-schedule one-cycle --poison-rate 0.1
"""

from torch import nn

LAYOUT = [16, "M", 32, "M", 64, 64, "M", 128, 128]  # channels of 3x3 convolutions; M halves height and width


def plain_cnn(num_classes: int = 10) -> nn.Module:
    """Build six convolutions with ReLUs, no normalisation, and one linear classifier: 283,000 parameters.

    The weights keep the size of what passes through them (He et al., ICCV 2015), since no layer rescales it.

    Args:
        num_classes: number of outputs, at least 1.

    Shape:
        The network maps float (B, 3, H, W), normalised, to float logits (B, num_classes); H and W are at least 8.
    """
    layers, channels = [], 3
    for entry in LAYOUT:
        if entry == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        convolution = nn.Conv2d(channels, entry, 3, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        nn.init.zeros_(convolution.bias)
        layers += [convolution, nn.ReLU(inplace=True)]
        channels = entry
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
