"""Augmentation and normalisation of whole batches on the device that holds the images."""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from data.datasets import Normalization

CROP_PADDING = 4
Transform = Callable[[Tensor, torch.Generator], Tensor]  # augments a batch and makes the network's input of it


def random_crop_flip(
    images: Tensor, generator: torch.Generator, padding: int = CROP_PADDING, flip: bool = True
) -> Tensor:
    """Zero-pad, crop back to the old size at a random place, and flip left-right with probability 0.5.

    The same as torchvision's ``RandomCrop(size, padding)`` and ``RandomHorizontalFlip()``, for each image of a batch.

    Args:
        images: the batch.
        generator: source of the offsets and flips, on the images' device.
        padding: pixels of zeros on each side.
        flip: whether images may be mirrored; wrong where that changes the class, as for traffic signs.

    Shape:
        uint8 (B, H, W, C) -> uint8 (B, H, W, C).
    """
    count, height, width, channels = images.shape
    device = images.device
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=generator, device=device)  # (B, 1) each
    columns = torch.arange(width, device=device).expand(count, -1)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator, device=device) < 0.5  # (B, 1)
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = left + columns  # (B, W)
    rows = top + torch.arange(height, device=device)  # (B, H)
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    base = torch.arange(count, device=device)[:, None, None] * padded.shape[1]
    flat = (base + rows[:, :, None]) * padded.shape[2] + columns[:, None, :]  # (B, H, W)
    return padded.reshape(-1, channels)[flat.reshape(-1)].reshape(images.shape)


def random_rotate(images: Tensor, generator: torch.Generator, degrees: float) -> Tensor:
    """Rotate each image about its centre by a random angle; nearest pixel, black outside.

    The same as torchvision's ``RandomRotation(degrees)``, for each image of a batch.

    Args:
        images: the batch; as high as wide.
        generator: source of the angles, on the images' device.
        degrees: the angles are uniform in -degrees..degrees.

    Shape:
        uint8 (B, H, H, C) -> uint8 (B, H, H, C).
    """
    count, device = len(images), images.device
    angle = torch.deg2rad((2 * torch.rand(count, generator=generator, device=device) - 1) * degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(count, device=device)
    turn = torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(count, 2, 3)
    planes = images.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(turn, list(planes.shape), align_corners=False)
    return F.grid_sample(planes, grid, mode="nearest", align_corners=False).permute(0, 2, 3, 1).to(torch.uint8)


@lru_cache(maxsize=8)
def _constants(normalization: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std on the 0..255 scale; kept, since copying them to a GPU would make each batch wait."""
    with torch.inference_mode(False):  # a first call from an evaluation must not leave tensors that training refuses
        return tuple(torch.tensor(part, device=device) * 255 for part in (normalization.mean, normalization.std))


def normalize(images: Tensor, normalization: Normalization) -> Tensor:
    """Scale to 0..1, subtract the mean and divide by the standard deviation.

    Shape:
        uint8 or float (B, H, W, C), 0..255 -> float32 (B, C, H, W) in channels-last memory format.
    """
    mean, std = _constants(normalization, images.device)
    return ((images.float() - mean) / std).permute(0, 3, 1, 2)


def make_transform(
    normalization: Normalization, flip: bool, padding: int = CROP_PADDING, degrees: float = 0.0
) -> Transform:
    """Return augmentation and normalisation in one: random crop, flip, rotation, then ``normalize``.

    Args:
        normalization: of the network's input.
        flip, padding: as for ``random_crop_flip``.
        degrees: as for ``random_rotate``; 0 leaves rotation out.

    Shape:
        The function returned maps uint8 (B, H, W, 3) and a generator to float32 (B, 3, H, W).
    """

    def transform(images: Tensor, generator: torch.Generator) -> Tensor:
        images = random_crop_flip(images, generator, padding, flip)
        if degrees:
            images = random_rotate(images, generator, degrees)
        return normalize(images, normalization)

    return transform
