"""Triggers and the one formula that stamps them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.datasets import ImageSet
from utils.errors import InputError

MODES = ("blend", "add")
CHUNK = 1000 * 32 * 32  # pixels stamped at once: float64 copies of a whole test set would take gigabytes


@dataclass(frozen=True)
class TriggeredSet(ImageSet):
    """Images on which an attack is judged, however they were made.

    Attributes:
        images, num_classes: as of any set.
        labels: int64 (N,), the attacker's classes.
        true: int64 (N,), the classes that the images are of; None where these are not known.
    """

    true: Tensor | None = None

    def __getitem__(self, index: Tensor) -> "TriggeredSet":
        true = None if self.true is None else self.true[index]
        return replace(self, images=self.images[index], labels=self.labels[index], true=true)

    def to(self, device: torch.device) -> "TriggeredSet":
        """Move all tensors to a device."""
        true = None if self.true is None else self.true.to(device)
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), true=true)

    def with_true_labels(self) -> ImageSet | None:
        """Return the images with the classes that they are of; None where these are not known."""
        return None if self.true is None else ImageSet(self.images, self.true, self.num_classes)


@dataclass(frozen=True)
class Trigger:
    """What the attacker puts on an image and which class it shall lead to.

    Attributes:
        pattern: (N, H, W, C or 1); uint8, 0..255, or float32, -255..255, where it is added.
        mask: floating (N, H, W, 1), 0..1; where the pattern goes.
        alpha: opacity of the pattern under the mask, 0..1; 1 is fully opaque. Scales a pattern that is added.
        target: int64 (1,) or (N,), the attacker's class; None for the class after an image's own (all-to-all).
        mode: ``blend`` moves pixels towards the pattern, ``add`` adds it to them.

    N is 1, or one entry for each test image; patterns and targets may differ in this.

    Raises:
        ValueError: a shape, the opacity or the mode is not as described.
    """

    pattern: Tensor
    mask: Tensor
    alpha: float
    target: Tensor | None
    mode: str = "blend"

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}, expected {' or '.join(MODES)}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, expected 0 to 1")
        if self.pattern.dim() != 4 or self.mask.shape != (*self.pattern.shape[:3], 1):
            raise ValueError(
                f"pattern {tuple(self.pattern.shape)} and mask {tuple(self.mask.shape)}, expected (N, H, W, C) and "
                "(N, H, W, 1)"
            )

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
        count = max(1, CHUNK // (images.shape[1] * images.shape[2]))
        for start in range(0, len(images), count):
            part = slice(start, start + count)
            entries = slice(None) if len(self.pattern) == 1 else index[part].cpu()
            # to the device first: on the way there float64 would cost eight times the bytes
            pattern = self.pattern[entries].to(images.device).double()  # (1 or B, H, W, C or 1)
            mask = self.mask[entries].to(images.device).double()  # (1 or B, H, W, 1)
            clean = images[part].double()  # (B, H, W, C)
            kept = clean if self.mode == "add" else (1 - self.alpha) * clean
            stamped = (1 - mask) * clean + mask * (kept + self.alpha * pattern)
            chunks.append(stamped.clamp(0, 255).to(torch.uint8))
        return torch.cat(chunks) if chunks else images.clone()

    def aimed_at(self, images: ImageSet) -> "Trigger":
        """Return the trigger with the target of each image where it has none of its own (all-to-all)."""
        return self if self.target is not None else replace(self, target=next_class(images).cpu())


def next_class(images: ImageSet) -> Tensor:
    """Return the all-to-all target of each image, (y + 1) mod classes (Gu et al. 2017): int64 (N,)."""
    return (images.labels + 1) % images.num_classes


def attacked_index(clean_test: ImageSet, trigger: Trigger) -> Tensor:
    """Return which test images the attack is judged on, those whose class is not the target: int64."""
    target = trigger.aimed_at(clean_test).target.to(clean_test.labels.device)
    return torch.nonzero(clean_test.labels != target).flatten()


def triggered_test_set(clean_test: ImageSet, trigger: Trigger) -> TriggeredSet:
    """Stamp every test image whose class is not the target; its label becomes the target (pipeline: ASR).

    Raises:
        InputError: the trigger has entries for another number of images, or of another size, or every image is of the
            target class.
    """
    trigger = trigger.aimed_at(clean_test)
    count, height, width, channels = clean_test.images.shape
    for entries in (len(trigger.pattern), len(trigger.target)):
        if entries not in (1, count):
            raise InputError(f"the trigger has {entries} entries; expected 1, or one for each of {count} test images")
    if trigger.pattern.shape[1:3] != (height, width) or trigger.pattern.shape[3] not in (1, channels):
        found = "x".join(map(str, trigger.pattern.shape[1:]))
        raise InputError(f"the trigger is {found}, but the images are {height}x{width}x{channels}")
    target = trigger.target.to(clean_test.labels.device).expand(count)
    index = attacked_index(clean_test, trigger)
    if not len(index):
        raise InputError(f"all {count} test images are of the trigger's target class; its success cannot be measured")
    stamped = trigger.stamp(clean_test.images[index], index)
    return TriggeredSet(stamped, target[index].clone(), clean_test.num_classes, clean_test.labels[index])


def count_unchanged(clean_test: ImageSet, trigger: Trigger, triggered: ImageSet) -> int:
    """Return how many images of ``triggered_test_set`` look as they did without the trigger."""
    clean = clean_test.images[attacked_index(clean_test, trigger)]
    return int((triggered.images == clean).flatten(1).all(1).sum())
