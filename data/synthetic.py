"""A ten-class set that is drawn, not downloaded: shapes and textures over clutter, in CIFAR-10's image shape.

Each class is a shape with a texture of its own. Colour, position, size, slant, contrast and noise vary from image to
image, and the background holds shades and strokes that belong to no class, so that a network has to learn features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.seeding import seeded_generator

SIZE = 32
CLASSES = (
    "disc",
    "square",
    "triangle",
    "ring",
    "plus",
    "saltire",
    "striped disc",
    "striped square",
    "chequers",
    "frame",
)  # in the order of ``_inside``
NUM_CLASSES = len(CLASSES)
SYNTHETIC_SEED = 0
CHUNK = 500  # images drawn at once


def _inside(u: Tensor, v: Tensor) -> list[Tensor]:
    """Return for each class where its shape is, in object coordinates: -1..1 spans the object."""
    radius = torch.sqrt(u**2 + v**2)
    square = torch.maximum(u.abs(), v.abs())
    disc = radius < 1
    triangle = (v < 0.8) & (v > 2.2 * u.abs() - 1)
    plus = (square < 1) & (torch.minimum(u.abs(), v.abs()) < 0.3)
    saltire = (square < 1) & (torch.minimum((u + v).abs(), (u - v).abs()) < 0.4)
    return [
        disc,
        square < 0.9,
        triangle,
        disc & (radius > 0.55),
        plus,
        saltire,
        disc & (torch.sin(v * 9) > 0),
        (square < 0.95) & (torch.sin(u * 9) > 0),
        (square < 0.95) & (torch.sin(u * 7) * torch.sin(v * 7) > 0),
        (square < 0.95) & (square > 0.55),
    ]


def _uniform(generator: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator)


def _object_coordinates(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return u and v, (B, H, W) each, of objects at random places, sizes and slants."""
    axis = torch.arange(SIZE, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    centre_y, centre_x = _uniform(generator, 2, count, 1, 1, low=10, high=22)
    radius = _uniform(generator, count, 1, 1, low=6.5, high=11)
    angle = _uniform(generator, count, 1, 1, low=-0.3, high=0.3)
    dy, dx = (y - centre_y) / radius, (x - centre_x) / radius
    return dx * torch.cos(angle) + dy * torch.sin(angle), dy * torch.cos(angle) - dx * torch.sin(angle)


def _clutter(count: int, generator: torch.Generator) -> Tensor:
    """Return backgrounds (B, 3, H, W) in 0..1: smooth shades crossed by two soft strokes."""
    shades = _uniform(generator, count, 3, 5, 5)
    image = F.interpolate(shades, size=(SIZE, SIZE), mode="bilinear", align_corners=True) * 0.4 + 0.3
    axis = torch.arange(SIZE, dtype=torch.float32) - SIZE / 2
    for _ in range(2):
        angle = _uniform(generator, count, 1, 1, high=math.pi)
        offset = _uniform(generator, count, 1, 1, low=-14, high=14)
        distance = axis * torch.cos(angle) + axis[:, None] * torch.sin(angle) - offset
        colour = _uniform(generator, count, 3, 1, 1, low=0.25, high=0.75)
        image = image + (colour - image) * (0.5 * torch.exp(-((distance / 1.5) ** 2)))[:, None]
    return image


def _draw_chunk(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one image for each label: int64 (B,) -> uint8 (B, H, W, 3)."""
    count = len(labels)
    background = _clutter(count, generator)
    shapes = torch.stack(_inside(*_object_coordinates(count, generator)))  # (10, B, H, W)
    shape = shapes[labels, torch.arange(count)][:, None]  # (B, 1, H, W)
    colour = _uniform(generator, count, 3, 1, 1, low=0.25, high=0.75)
    # Push the colour away from the mean background, or some objects could not be seen.
    contrast = colour - background.mean((2, 3), keepdim=True)
    colour = (colour + 0.15 * contrast / contrast.norm(dim=1, keepdim=True).clamp_min(0.05)).clamp(0.1, 0.9)
    image = torch.where(shape, colour, background)
    noise = torch.randn(image.shape, generator=generator) * _uniform(generator, count, 1, 1, 1, low=0.0, high=0.02)
    return ((image + noise).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def draw_images(count: int, part: str) -> tuple[Tensor, Tensor]:
    """Draw a part of the synthetic set; the same arguments always give the same images.

    Args:
        count: number of images.
        part: ``"train"`` or ``"test"``; names the random stream.

    Returns:
        images uint8 (count, 32, 32, 3), 0..255, and labels int64 (count,), each class equally often up to rounding.
    """
    order = torch.randperm(count, generator=seeded_generator(SYNTHETIC_SEED, part, "labels"))
    labels = order % NUM_CLASSES
    chunks = [
        _draw_chunk(part_labels, seeded_generator(SYNTHETIC_SEED, part, number))
        for number, part_labels in enumerate(labels.split(CHUNK))
    ]
    return torch.cat(chunks), labels
