"""Datasets as uint8 tensors held in memory."""

from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from data.errors import InputError
from data.synthetic import draw_images


@dataclass(frozen=True)
class ImageSet:
    """Images and labels.

    Shape:
        images: uint8 (N, H, W, 3), 0..255. labels: int64 (N,).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "ImageSet":
        return ImageSet(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "ImageSet":
        """Move both tensors to a device."""
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation on the 0..1 scale."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Dataset:
    """A training and a test set with what a model card has to say about them."""

    name: str
    num_classes: int
    normalization: Normalization
    train: ImageSet
    test: ImageSet


# The std of the ANP release (kuangliu's); many toolkits use (0.247, 0.243, 0.261) instead.
CIFAR10_NORMALIZATION = Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
SYNTHETIC_NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SYNTHETIC_SIZES = {"train": 10_000, "test": 2_000}


def _read_cifar10(root: Path, train: bool) -> ImageSet:
    part = CIFAR10(root, train=train)
    return ImageSet(torch.from_numpy(part.data), torch.tensor(part.targets))


def load_cifar10(root: str | Path) -> Dataset:
    """Read CIFAR-10 (Krizhevsky 2009), downloading it first if ``root`` has no intact copy.

    Args:
        root: the folder that holds, or shall hold, ``cifar-10-batches-py``.

    Raises:
        InputError: there is no intact copy and none can be downloaded.
    """
    root = Path(root)
    try:
        CIFAR10(root)
    except RuntimeError:
        _download_cifar10(root)
    train, test = (_read_cifar10(root, train) for train in (True, False))
    return Dataset("cifar10", 10, CIFAR10_NORMALIZATION, train, test)


def _download_cifar10(root: Path) -> None:
    try:
        CIFAR10(root, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"no intact CIFAR-10 in {root.absolute()} and the download failed ({reason}): unpack there "
            "cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, name its folder with --data-dir, "
            "or use --dataset synthetic"
        ) from error


def load_synthetic(root: str | Path | None = None) -> Dataset:
    """Draw the synthetic ten-class set (``data.synthetic``): 10,000 training and 2,000 test images, always the same.

    Args:
        root: not used; the set is drawn, not read.
    """
    train, test = (ImageSet(*draw_images(size, part)) for part, size in SYNTHETIC_SIZES.items())
    return Dataset("synthetic", 10, SYNTHETIC_NORMALIZATION, train, test)


DATASETS = {"cifar10": load_cifar10, "synthetic": load_synthetic}


def load_dataset(name: str, root: str | Path, device: torch.device | str = "cpu") -> Dataset:
    """Load a dataset by name and hold it on a device.

    Args:
        name: a key of ``DATASETS``.
        root: folder of the files, for datasets that have any.
        device: where the images are kept.

    Raises:
        InputError: the files are missing or damaged.
    """
    dataset = DATASETS[name](root)
    return replace(dataset, train=dataset.train.to(device), test=dataset.test.to(device))
