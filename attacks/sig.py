"""SIG (Barni, Kallas, Tondi, ICIP 2019): a sinusoidal signal added to images of the target class; labels stay."""

import math

import torch
from torch import Tensor

from attacks.attack import AttackContext, PoisonedSet, draw_poisoned_index, stamp_and_relabel, target_class
from data.triggers import Trigger


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


def poison_sig(context: AttackContext) -> PoisonedSet:
    """Add the signal to a share of the target class.

    Raises:
        InputError: the target is no class, or the poison rate leaves no image to poison.
    """
    target, options = target_class(context), context.options
    shape = context.dataset.train.images.shape[1:3]
    pattern, mask = sinusoid(*shape, options.sig_delta, options.sig_frequency)
    index = draw_poisoned_index(context, context.dataset.train.labels == target)
    trigger = Trigger(pattern, mask, 1.0, torch.tensor([target]), index, mode="add")
    return stamp_and_relabel(context, trigger)
