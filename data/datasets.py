"""Datasets as uint8 tensors held in memory."""

from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from data.synthetic import CLASSES, NUM_CLASSES, draw_images
from utils.config import Config, InputFile, Range, setting
from utils.errors import InputError


@dataclass(frozen=True)
class ImageSet:
    """Images and labels.

    Attributes:
        images: uint8 (N, H, W, 3), 0..255.
        labels: int64 (N,), 0..num_classes-1.
        num_classes: of the dataset they belong to.

    Raises:
        ValueError: there is not one label for each image.
    """

    images: Tensor
    labels: Tensor
    num_classes: int

    def __post_init__(self):
        count = len(self.images)
        if self.labels.dtype != torch.int64 or self.labels.shape != (count,):
            raise ValueError(f"labels are {self.labels.dtype} {tuple(self.labels.shape)}, expected int64 ({count},)")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "ImageSet":
        return replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device) -> "ImageSet":
        """Move both tensors to a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))


# Beyond these the network's input is no longer finite. A network that takes pixels of 0..255 has a std of 1/255.
MEANS, STDS = Range(0, 1e4), Range(1e-4, 1e4)


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation on the 0..1 scale."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class Dataset:
    """A training and a test set with what a model card has to say about them.

    Attributes:
        name: a key of ``DATASETS``.
        normalization: of the input of networks trained on it.
        flip: whether a mirrored image keeps its class, so that augmentation may mirror it.
        classes: their names, in the order of the labels.
        train, test: the images.
    """

    name: str
    normalization: Normalization
    flip: bool
    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.train.num_classes


# The std of the ANP release (kuangliu's); many toolkits use (0.247, 0.243, 0.261) instead.
CIFAR10_NORMALIZATION = Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SYNTHETIC_NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SYNTHETIC_SIZES = {"train": 10_000, "test": 2_000}


def _read_cifar10(root: Path) -> tuple[ImageSet, ImageSet]:
    parts = (CIFAR10(root, train=train) for train in (True, False))
    return tuple(ImageSet(torch.from_numpy(part.data), torch.tensor(part.targets), 10) for part in parts)


def load_cifar10(root: str | Path) -> Dataset:
    """Read CIFAR-10 (Krizhevsky 2009), downloading it first if ``root`` has no intact copy.

    Args:
        root: the folder that holds, or shall hold, ``cifar-10-batches-py``.

    Raises:
        InputError: there is no intact copy and none can be downloaded.
    """
    root = Path(root)
    try:
        train, test = _read_cifar10(root)
    except RuntimeError:
        _download_cifar10(root)
        train, test = _read_cifar10(root)
    return Dataset("cifar10", CIFAR10_NORMALIZATION, True, CIFAR10_CLASSES, train, test)


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
    train, test = (ImageSet(*draw_images(size, part), NUM_CLASSES) for part, size in SYNTHETIC_SIZES.items())
    return Dataset("synthetic", SYNTHETIC_NORMALIZATION, True, CLASSES, train, test)


DATASETS = {"cifar10": load_cifar10, "synthetic": load_synthetic}


@dataclass(frozen=True)
class DataConfig(Config):
    """Which images."""

    dataset: str = setting("cifar10", "cifar10, or synthetic (generated, nothing to download)", choices=DATASETS)


@dataclass(frozen=True)
class FolderConfig(Config):
    """Where a run finds the images; a model card does not decide this."""

    data_dir: str = setting("../data", "folder that holds cifar-10-batches-py", metavar="DIR")


@dataclass(frozen=True)
class SourceConfig(FolderConfig):
    """Where a run finds the images and the split."""

    split_file: InputFile | None = setting(
        None,
        "a permutation of the training images, one index a line, such as the release's; needed for its published "
        "checkpoints (default: this project's own)",
        metavar="FILE",
    )


def load_dataset(name: str, root: str | Path, device: torch.device | str = "cpu") -> Dataset:
    """Load a dataset by name and hold it on a device.

    Args:
        name: a key of ``DATASETS``.
        root: folder of the files, for datasets that have any.
        device: where the images are kept.

    Raises:
        InputError: the name is unknown, or the files are missing or damaged.
    """
    if name not in DATASETS:
        raise InputError(f"unknown dataset {name!r}; known are {', '.join(DATASETS)}")
    dataset = DATASETS[name](root)
    return replace(dataset, train=dataset.train.to(device), test=dataset.test.to(device))
