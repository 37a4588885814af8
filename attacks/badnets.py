"""BadNets (Gu, Dolan-Gavitt, Garg 2017): a small checkerboard in a corner, labels changed to the target."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.attack import SHARE, Attack, OneTarget, PoisonedSet, draw_poisoned, opacity_setting, stamp_and_relabel
from data.datasets import ImageSet
from data.triggers import Trigger, next_class
from utils.config import setting

CHECKERBOARD = ((0, 0, 255), (0, 255, 0), (255, 0, 255))


def corner_checkerboard(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return pattern uint8 (1, H, W, 1) and mask float64 (1, H, W, 1) of the 3x3 checkerboard, bottom right."""
    pattern = torch.zeros(1, height, width, 1, dtype=torch.uint8)
    pattern[0, -3:, -3:, 0] = torch.tensor(CHECKERBOARD, dtype=torch.uint8)
    mask = torch.zeros(1, height, width, 1, dtype=torch.float64)
    mask[0, -3:, -3:] = 1
    return pattern, mask


@dataclass(frozen=True)
class BadNets(OneTarget):
    """All-to-one: stamped images of other classes are labelled as the target."""

    def pattern(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """See ``OneTarget``."""
        return corner_checkerboard(height, width)


@dataclass(frozen=True)
class BadNetsAllToAll(Attack):
    """Stamped images of every class y are labelled y + 1 (Gu et al. 2017, section 3.1.2)."""

    poison_rate: float = setting(0.1, "share of all training images that is poisoned", SHARE)
    trigger_alpha: float = opacity_setting(1.0)

    def poison(self, train: ImageSet, seed: int = 0) -> PoisonedSet:
        """See ``Attack``."""
        index = draw_poisoned(torch.ones(len(train), dtype=torch.bool), self.poison_rate, seed)
        trigger = Trigger(*corner_checkerboard(*train.images.shape[1:3]), self.trigger_alpha, None)
        return stamp_and_relabel(train, trigger, index, next_class(train))
