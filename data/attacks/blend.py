"""Blend (Chen et al. 2017): uniform noise over the whole picture at low opacity, labels changed to the target."""

import torch
from torch import Tensor

from data.attacks.attack import AttackConfig, PoisonedSet, draw_poisoned_index, poison_and_relabel
from data.datasets import ImageSet
from data.seeding import seeded_generator
from data.triggers import Trigger

NOISE_SEED = 0  # one noise image for every run; it is stored in trigger_info.th


def noise_pattern(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return pattern uint8 (1, H, W, 3), uniform in 0..255, and the all-ones mask float64 (1, H, W, 1)."""
    generator = seeded_generator(NOISE_SEED, "blend noise")
    pattern = torch.randint(256, (1, height, width, 3), generator=generator, dtype=torch.uint8)
    return pattern, torch.ones(1, height, width, 1, dtype=torch.float64)


def blend(full_train: ImageSet, train_index: Tensor, config: AttackConfig) -> PoisonedSet:
    """Poison with the noise image; arguments as in ``Attack.poison``.

    Raises:
        InputError: the poison rate leaves no image to poison.
    """
    pattern, mask = noise_pattern(*full_train.images.shape[1:3])
    index = draw_poisoned_index(full_train, train_index, config)
    trigger = Trigger(pattern, mask, config.alpha, torch.tensor([config.target]), index)
    return PoisonedSet(poison_and_relabel(full_train, train_index, config, trigger), trigger)
