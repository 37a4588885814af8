"""ResNet-18 with GroupNorm for BatchNorm (Wu & He, *Group Normalization*, ECCV 2018), for ``--model``.

python train_backdoor_cifar.py --model examples/resnet18_groupnorm.py:quarter --epoch 15 --lr-schedule one-cycle
"""

from torch import nn

from models import build_model

GROUPS = 8


def quarter(num_classes: int = 10) -> nn.Module:
    """Build a ResNet-18 at 1/4 of the width, 16 to 128 channels in 8 groups.

    Args:
        num_classes: number of outputs.

    Shape:
        float (B, 3, H, W), normalised -> float logits (B, num_classes).
    """
    network = build_model("resnet18", num_classes, 0.25)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(GROUPS, child.num_features))
    return network
