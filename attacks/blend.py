"""Blend (Chen et al. 2017): uniform noise over the whole picture at low opacity, labels changed to the target."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.attack import OneTarget, opacity_setting
from utils.seeding import seeded_generator

NOISE_SEED = 0  # one noise image for every run; it is stored in trigger_info.th


def noise_pattern(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return pattern uint8 (1, H, W, 3), uniform in 0..255, and the all-ones mask float64 (1, H, W, 1)."""
    generator = seeded_generator(NOISE_SEED, "blend noise")
    pattern = torch.randint(256, (1, height, width, 3), generator=generator, dtype=torch.uint8)
    return pattern, torch.ones(1, height, width, 1, dtype=torch.float64)


@dataclass(frozen=True)
class Blend(OneTarget):
    """All-to-one: blended images of other classes are labelled as the target."""

    trigger_alpha: float = opacity_setting(0.2)

    def pattern(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """See ``OneTarget``."""
        return noise_pattern(height, width)
