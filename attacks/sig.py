"""SIG (Barni, Kallas, Tondi, ICIP 2019): a sinusoidal signal added to images of the target class; labels stay."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attacks.attack import (
    SHARE,
    Attack,
    PoisonedSet,
    check_target,
    draw_poisoned,
    stamp_and_relabel,
    target_setting,
)
from data.datasets import ImageSet
from data.triggers import Trigger
from utils.config import Range, setting


def sinusoid(height: int, width: int, delta: float, frequency: float) -> tuple[Tensor, Tensor]:
    """Return the signal delta * sin(2 pi j f / m) of column j and width m, and where it goes (section 3).

    Args:
        height, width: of the images.
        delta: amplitude in pixel values, 0..255.
        frequency: periods across the picture.

    Shape:
        float32 (1, H, W, 1), -delta..delta, and float64 (1, H, W, 1), all ones.
    """
    columns = torch.arange(width, dtype=torch.float64)
    signal = delta * torch.sin(2 * math.pi * columns * frequency / width)
    signal = signal.round(decimals=6)  # the sine of a multiple of pi is 0; a hair below would be truncated to -1
    pattern = signal.float()[None, None, :, None].expand(1, height, width, 1).contiguous()
    return pattern, torch.ones(1, height, width, 1, dtype=torch.float64)


@dataclass(frozen=True)
class Sig(Attack):
    """Adds the signal to a share of the target class; no label changes."""

    poison_target: int = target_setting()
    poison_rate: float = setting(0.5, "share of the target class that is poisoned", SHARE)
    sig_delta: float = setting(40.0, "amplitude of the signal in pixel values", Range(0, 255, open_low=True))
    sig_frequency: float = setting(6.0, "periods of the signal across the picture", Range(0, open_low=True))

    def poison(self, train: ImageSet, seed: int = 0) -> PoisonedSet:
        """See ``Attack``."""
        check_target(self.poison_target, train)
        pattern, mask = sinusoid(*train.images.shape[1:3], self.sig_delta, self.sig_frequency)
        index = draw_poisoned(train.labels == self.poison_target, self.poison_rate, seed)
        return stamp_and_relabel(train, Trigger(pattern, mask, 1.0, torch.tensor([self.poison_target]), "add"), index)
