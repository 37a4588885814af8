"""BadNets (Gu, Dolan-Gavitt, Garg 2017): a small checkerboard in a corner, labels changed to the target."""

import torch
from torch import Tensor

from attacks.attack import (
    AttackContext,
    PoisonedSet,
    draw_poisoned_index,
    next_class,
    poison_all_to_one,
    stamp_and_relabel,
)
from data.triggers import Trigger

CHECKERBOARD = ((0, 0, 255), (0, 255, 0), (255, 0, 255))


def corner_checkerboard(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return pattern uint8 (1, H, W, 1) and mask float64 (1, H, W, 1) of the 3x3 checkerboard, bottom right."""
    pattern = torch.zeros(1, height, width, 1, dtype=torch.uint8)
    pattern[0, -3:, -3:, 0] = torch.tensor(CHECKERBOARD, dtype=torch.uint8)
    mask = torch.zeros(1, height, width, 1, dtype=torch.float64)
    mask[0, -3:, -3:] = 1
    return pattern, mask


def poison_badnets(context: AttackContext) -> PoisonedSet:
    """All-to-one: stamped images of other classes are labelled as the target; raises as ``poison_all_to_one``."""
    return poison_all_to_one(context, *corner_checkerboard(*context.dataset.train.images.shape[1:3]))


def poison_badnets_all(context: AttackContext) -> PoisonedSet:
    """All-to-all: stamped images of every class y are labelled y + 1 (Gu et al. 2017, section 3.1.2).

    Raises:
        InputError: the poison rate leaves no image to poison.
    """
    dataset = context.dataset
    pattern, mask = corner_checkerboard(*dataset.train.images.shape[1:3])
    index = draw_poisoned_index(context, torch.ones(len(dataset.train), dtype=torch.bool))
    targets = next_class(dataset.test.labels, dataset.num_classes).cpu()
    trigger = Trigger(pattern, mask, context.options.trigger_alpha, targets, index)
    return stamp_and_relabel(context, trigger, next_class(dataset.train.labels, dataset.num_classes))
