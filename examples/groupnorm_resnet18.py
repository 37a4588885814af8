"""ResNet-18 with GroupNorm for BatchNorm (Wu & He, *Group Normalization*, ECCV 2018), for ``--model``.

CPU minutes, nothing to download:
    python train_backdoor_cifar.py --model examples/groupnorm_resnet18.py:groupnorm_resnet18 --dataset synthetic \\
        --epoch 12 --batch-size 64 --lr-schedule one-cycle --poison-rate 0.1
"""

from torch import nn

from models import build_model

WIDTH, GROUPS = 0.125, 4


def groupnorm_resnet18(num_classes: int = 10) -> nn.Module:
    """Build a ResNet-18 at 1/8 of the width, 8 to 64 channels in 4 groups.

    Args:
        num_classes: number of outputs, at least 1.

    Shape:
        float (B, 3, H, W), normalised -> float logits (B, num_classes).
    """
    network = build_model("resnet18", num_classes, WIDTH)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(GROUPS, child.num_features))
    return network
