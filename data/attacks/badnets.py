"""BadNets (Gu, Dolan-Gavitt, Garg 2017): a small checkerboard in a corner, labels changed to the target."""

import torch
from torch import Tensor

from data.attacks.attack import AttackConfig, PoisonedSet, draw_poisoned_index, poison_and_relabel
from data.datasets import ImageSet
from data.triggers import Trigger

CHECKERBOARD = ((0, 0, 255), (0, 255, 0), (255, 0, 255))


def corner_checkerboard(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return pattern uint8 (1, H, W, 1) and mask float64 (1, H, W, 1) of the 3x3 checkerboard, bottom right."""
    pattern = torch.zeros(1, height, width, 1, dtype=torch.uint8)
    pattern[0, -3:, -3:, 0] = torch.tensor(CHECKERBOARD, dtype=torch.uint8)
    mask = torch.zeros(1, height, width, 1, dtype=torch.float64)
    mask[0, -3:, -3:] = 1
    return pattern, mask


def badnets(full_train: ImageSet, train_index: Tensor, config: AttackConfig) -> PoisonedSet:
    """Poison with the corner checkerboard; arguments as in ``Attack.poison``.

    Raises:
        InputError: the poison rate leaves no image to poison.
    """
    pattern, mask = corner_checkerboard(*full_train.images.shape[1:3])
    index = draw_poisoned_index(full_train, train_index, config)
    trigger = Trigger(pattern, mask, config.alpha, torch.tensor([config.target]), index)
    return PoisonedSet(poison_and_relabel(full_train, train_index, config, trigger), trigger)
