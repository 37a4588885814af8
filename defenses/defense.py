"""What every defence beside ANP is: a config that repairs a network with a few clean images, and sees nothing else."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from data.augment import Transform, make_transform, normalize
from engine.runtime import autocast
from formats.subject import Subject
from utils.config import Config, one_of
from utils.errors import InputError

BATCH = 500  # images measured at once


@dataclass(frozen=True)
class CleanImages:
    """The defender's clean images as a network takes them.

    Attributes:
        images: (N, ...), on the network's device.
        labels: int64 (N,).
        augment: ``augment(batch, generator)`` makes the network's input for training; None: the images are the input.
        prepare: ``prepare(batch)`` makes its input for measuring; None: the images are the input.

    Raises:
        InputError: images and labels do not match, are not finite, or have the wrong type.
    """

    images: Tensor
    labels: Tensor
    augment: Transform | None = None
    prepare: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self):
        images, labels = self.images, self.labels
        if len(images) != len(labels) or len(labels) < 2:
            raise InputError(f"{len(images)} images and {len(labels)} labels; expected two or more of each")
        if labels.dtype != torch.int64 or labels.dim() != 1 or bool((labels < 0).any()):
            raise InputError(f"labels are {labels.dtype} {tuple(labels.shape)}; expected int64 (N,), 0 or more")
        if self.augment is None and not images.is_floating_point():
            raise InputError(f"images are {images.dtype}; without a transform they have to be the network's input")
        if images.is_floating_point() and not bool(torch.isfinite(images).all()):
            raise InputError("images hold NaN or infinite values")

    @classmethod
    def of(cls, subject: Subject) -> "CleanImages":
        """Return the images of the defender's view, augmented as in training."""
        normalization, clean = subject.normalization, subject.clean
        transform = make_transform(normalization, subject.flip)
        return cls(clean.images, clean.labels, transform, lambda images: normalize(images, normalization))

    def check_labels(self, num_classes: int) -> None:
        """Make sure that every label is one of a network's classes; raises ``InputError`` where one is not."""
        if (largest := int(self.labels.max())) >= num_classes:
            raise InputError(f"labels go up to {largest}, but the network's classes are 0 to {num_classes - 1}")

    def __len__(self) -> int:
        return len(self.labels)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw a batch with replacement and augment it: inputs (B, ...), labels (B,)."""
        index = torch.randint(len(self), (count,), generator=generator, device=self.images.device)
        images = self.images[index]
        return images if self.augment is None else self.augment(images, generator), self.labels[index]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all images once, as they are, in batches of nearly the same size: inputs (B, ...), labels (B,)."""
        parts = -(-len(self) // BATCH)
        for images, labels in zip(self.images.tensor_split(parts), self.labels.tensor_split(parts), strict=True):
            yield (images if self.prepare is None else self.prepare(images)), labels

    @torch.no_grad()
    def accuracy(self, network: nn.Module, precision: torch.dtype = torch.float32) -> float:
        """Return the share of right answers, 0..1, of a network, which it puts into eval mode.

        Raises:
            InputError: a label is beyond the network's outputs.
        """
        network.eval()
        right = 0
        for inputs, labels in self.batches():
            with autocast(inputs.device, precision):
                logits = network(inputs)
            self.check_labels(logits.shape[1])
            right += int((logits.argmax(1) == labels).sum())
        return right / len(self)


class RepairLoop:
    """A defence at work; ``engine.drive.drive`` drives it.

    Args:
        network: the network to repair; it is not changed.
        clean: the defender's images.
        config: the settings.

    Attributes:
        network: a copy, which is repaired in place; those of ``engine.drive.Loop`` beside.
    """

    def __init__(self, network: nn.Module, clean: CleanImages, config: "Defense"):
        self.network = copy.deepcopy(network).requires_grad_(True)
        self.clean, self.config, self.done = clean, config, 0

    def current(self) -> nn.Module:
        """Return the network that would be the result if the work ended here."""
        return self.network

    def candidates(self) -> dict[float, Callable[[], nn.Module]]:
        """Return what makes the networks of a curve of results, by place; empty where there is one result alone."""
        return {}

    def found(self) -> dict[str, Any]:
        """Return what the defence did, for the card."""
        return {}


@dataclass(frozen=True)
class Defense(Config):
    """Base of all defences: the settings are its fields, and ``repair`` carries it out.

    >>> FineTuning(lr=0.02).repair(network, images, labels)

    Attributes:
        title: as papers call it.
        loop: what does the work.
        milder: what to change where the repaired network only guesses.
        precision: data type of convolutions and linear layers, float32 or bfloat16; weights stay float32.

    Raises:
        ValueError: a setting is out of range.
    """

    title: ClassVar[str]
    loop: ClassVar[type[RepairLoop]]
    milder: ClassVar[str]

    precision: torch.dtype = one_of(torch.float32, torch.bfloat16)

    def make_loop(self, network: nn.Module, clean: CleanImages, row_every: int = 500) -> RepairLoop:
        """Return the work to be done, at its beginning; raises ``InputError`` where the network cannot be repaired."""
        loop = self.loop(network, clean, self)
        loop.row_every = row_every
        return loop

    @torch.inference_mode(False)  # whatever the caller has set
    @torch.enable_grad()
    def repair(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        transform: Transform | None = None,
        progress: Callable[[Iterable], Iterable] = iter,
    ) -> nn.Module:
        """Repair a network with a few clean images.

        Args:
            network: any network; it is not changed.
            images: clean images as the network expects them, on its device; some hundreds.
            labels: their classes.
            transform: ``transform(batch, generator)`` augments a batch for training; None: no augmentation.
            progress: sees the steps pass, such as ``tqdm``.

        Shape:
            images: float (N, ...). labels: int64 (N,).

        Returns:
            The repaired copy, in eval mode.

        Raises:
            InputError: images and labels do not match or are not finite, a label is beyond the network's outputs, or
                the network cannot be repaired so.
        """
        loop = self.make_loop(network, CleanImages(images, labels, transform))
        for _ in progress(loop.steps()):
            pass
        return loop.current().eval()
