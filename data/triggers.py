"""Triggers and the one formula that stamps them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.datasets import ImageSet
from data.errors import InputError

MODES = ("blend", "add")


@dataclass(frozen=True)
class Trigger:
    """What the attacker puts on an image and which class it shall lead to.

    Attributes:
        pattern: (N, H, W, C or 1); uint8, 0..255, or float32, -255..255, where it is added.
        mask: floating (N, H, W, 1), 0..1; where the pattern goes.
        alpha: opacity of the pattern under the mask, 0..1; 1 is fully opaque. Scales a pattern that is added.
        target: int64 (1,) or (N,); the attacker's class.
        data_index: int64; the training images that were poisoned.
        mode: ``blend`` moves pixels towards the pattern, ``add`` adds it to them.

    N is 1, or one entry for each test image; patterns and targets may differ in this.
    """

    pattern: Tensor
    mask: Tensor
    alpha: float
    target: Tensor
    data_index: Tensor
    mode: str = "blend"

    def stamp(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        """Stamp raw pixels: clip((1-mask)*x + mask*p, 0, 255), truncated.

        p is (1-alpha)*x + alpha*pattern in mode ``blend`` and x + alpha*pattern in mode ``add``.

        Args:
            images: the clean images.
            index: int64 (B,); which of the N entries goes on which image. Not needed where N is 1.

        Shape:
            uint8 (B, H, W, C) -> uint8 (B, H, W, C), 0..255.
        """
        chunks = []
        for start in range(0, len(images), 1000):  # float64 copies of the whole test set would take gigabytes
            part = slice(start, start + 1000)
            entries = slice(None) if len(self.pattern) == 1 else index[part].cpu()
            pattern = self.pattern[entries].to(images.device, torch.float64)
            mask = self.mask[entries].to(images.device, torch.float64)
            clean = images[part].double()
            kept = clean if self.mode == "add" else (1 - self.alpha) * clean
            stamped = (1 - mask) * clean + mask * (kept + self.alpha * pattern)
            chunks.append(stamped.clamp(0, 255).to(torch.uint8))
        return torch.cat(chunks) if chunks else images.clone()


def triggered_test_set(clean_test: ImageSet, trigger: Trigger) -> ImageSet:
    """Stamp every test image whose class is not the target; its label becomes the target (pipeline: ASR).

    Raises:
        InputError: the trigger has entries for another number of images, or of another size.
    """
    count, height, width, channels = clean_test.images.shape
    for entries in (len(trigger.pattern), len(trigger.target)):
        if entries not in (1, count):
            raise InputError(f"the trigger has {entries} entries; expected 1, or one for each of {count} test images")
    if trigger.pattern.shape[1:3] != (height, width) or trigger.pattern.shape[3] not in (1, channels):
        found = "x".join(map(str, trigger.pattern.shape[1:]))
        raise InputError(f"the trigger is {found}, but the images are {height}x{width}x{channels}")
    target = trigger.target.to(clean_test.labels.device).expand(count)
    index = torch.nonzero(clean_test.labels != target).flatten()
    return ImageSet(trigger.stamp(clean_test.images[index], index), target[index].clone())
