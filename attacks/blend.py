"""Blend (Chen et al. 2017): uniform noise over the whole picture at low opacity, labels changed to the target."""

import torch
from torch import Tensor

from attacks.attack import AttackContext, PoisonedSet, draw_poisoned_index, stamp_and_relabel, target_class
from data.seeding import seeded_generator
from data.triggers import Trigger

NOISE_SEED = 0  # one noise image for every run; it is stored in trigger_info.th


def noise_pattern(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return pattern uint8 (1, H, W, 3), uniform in 0..255, and the all-ones mask float64 (1, H, W, 1)."""
    generator = seeded_generator(NOISE_SEED, "blend noise")
    pattern = torch.randint(256, (1, height, width, 3), generator=generator, dtype=torch.uint8)
    return pattern, torch.ones(1, height, width, 1, dtype=torch.float64)


def poison_blend(context: AttackContext) -> PoisonedSet:
    """All-to-one: blended images of other classes are labelled as the target.

    Raises:
        InputError: the target is no class, or the poison rate leaves no image to poison.
    """
    target, labels = target_class(context), context.dataset.train.labels
    pattern, mask = noise_pattern(*context.dataset.train.images.shape[1:3])
    index = draw_poisoned_index(context, labels != target)
    trigger = Trigger(pattern, mask, context.options.trigger_alpha, torch.tensor([target]), index)
    return stamp_and_relabel(context, trigger, torch.full_like(labels, target))
