"""Datasets as uint8 tensors held in memory."""

import argparse
import difflib
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import published
from data.image_folder import SMALLEST, read_image_folder
from data.synthetic import CLASSES, draw_images
from utils.config import Config, InputFile, Range, setting
from utils.console import announce
from utils.errors import InputError, quote


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
        name: a key of ``DATASETS``, or ``folder:PATH``.
        normalization: of the input of networks trained on it.
        flip: whether a mirrored image keeps its class, so that augmentation may mirror it.
        classes: their names, in the order of the labels.
        train, test: the images.
        sha256: of all images, labels and names; None where the name says which they are.
        image_size: height and width to which a folder's pictures were brought; None where they were left as they are.
    """

    name: str
    normalization: Normalization
    flip: bool
    classes: tuple[str, ...]
    train: ImageSet
    test: ImageSet
    sha256: str | None = None
    image_size: int | None = None

    def describe(self) -> dict[str, Any]:
        """Return what a card says about the dataset; a folder may lie elsewhere, or hold other images by then."""
        known = {"dataset": self.name, "num_classes": self.num_classes}
        if self.sha256 is None:
            return known
        return {**known, "classes": list(self.classes), "dataset_sha256": self.sha256, "image_size": self.image_size}

    @property
    def identity(self) -> str:
        """What decides that two runs see the same images."""
        return self.sha256 or self.name

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.train.num_classes


# What the field uses; other constants train as well, but a network only works with its own.
CIFAR10_NORMALIZATION = Normalization(  # the std of the ANP release (kuangliu's pytorch-cifar)
    (0.4914, 0.4822, 0.4465),
    (0.2023, 0.1994, 0.2010),  # many toolkits use (0.247, 0.243, 0.261), which is that of all pixels
)
# Of all training pixels, as in weiaicunzai's pytorch-cifar100, here with four digits.
CIFAR100_NORMALIZATION = Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
# Of all training pixels.
SVHN_NORMALIZATION = Normalization((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
# Of poojahira's gtsrb-pytorch, on pictures of 32x32.
GTSRB_NORMALIZATION = Normalization((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669))
# Of tjmoon0104's pytorch-tiny-imagenet, and since then of BackdoorBench.
TINY_IMAGENET_NORMALIZATION = Normalization((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262))
SYNTHETIC_NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
SYNTHETIC_SIZES = {"train": 10_000, "test": 2_000}
FOLDER = "folder:"  # before the path
COUNTED = 2**22  # pixels at once; counting makes eight bytes of each


def _assemble(
    name: str, parts: published.Parts, normalization: Normalization | None, flip: bool, **known: Any
) -> Dataset:
    *labelled, classes = parts
    train, test = (ImageSet(images, labels, len(classes)) for images, labels in labelled)
    return Dataset(name, normalization or measure_normalization(train.images), flip, classes, train, test, **known)


def _published(
    name: str, read: Callable[[Path], published.Parts], normalization: Normalization, flip: bool
) -> Callable[[str | Path], Dataset]:
    """Return the loader of a published dataset."""
    return lambda root: _assemble(name, read(Path(root)), normalization, flip)


def load_synthetic(root: str | Path | None = None) -> Dataset:
    """Draw the synthetic ten-class set (``data.synthetic``): 10,000 training and 2,000 test images, always the same.

    Args:
        root: not used; the set is drawn, not read.
    """
    parts = (draw_images(size, part) for part, size in SYNTHETIC_SIZES.items())
    return _assemble("synthetic", (*parts, CLASSES), SYNTHETIC_NORMALIZATION, True)


# Each loads a dataset from the folder of its files. A mirrored digit or traffic sign may be another one, or none.
DATASETS: dict[str, Callable[[str | Path], Dataset]] = {
    "cifar10": _published("cifar10", published.read_cifar10, CIFAR10_NORMALIZATION, True),
    "cifar100": _published("cifar100", published.read_cifar100, CIFAR100_NORMALIZATION, True),
    "svhn": _published("svhn", published.read_svhn, SVHN_NORMALIZATION, False),
    "gtsrb": _published("gtsrb", published.read_gtsrb, GTSRB_NORMALIZATION, False),
    "tiny-imagenet-200": _published(
        "tiny-imagenet-200", published.read_tiny_imagenet, TINY_IMAGENET_NORMALIZATION, True
    ),
    "synthetic": load_synthetic,
}


def measure_normalization(images: Tensor) -> Normalization:
    """Return mean and standard deviation of each channel over all pixels, with four digits.

    Counted in whole numbers, so that they are the same on every machine.

    Shape:
        images: uint8 (N, H, W, 3), 0..255.
    """
    counts = sum(  # (3, 256)
        torch.stack([channel.bincount(minlength=256) for channel in part.T])
        for part in images.reshape(-1, 3).split(COUNTED)
    )
    levels = torch.arange(256)
    pixels = int(counts[0].sum())
    sums = [(int((row * levels).sum()), int((row * levels**2).sum())) for row in counts]
    means = [total / pixels for total, _ in sums]
    variances = [(squares * pixels - total**2) / pixels**2 for total, squares in sums]
    # at least one level of 255: the channels of a plain picture have no deviation
    stds = [max(math.sqrt(variance), 1) for variance in variances]
    return Normalization(*(tuple(round(value / 255, 4) for value in part) for part in (means, stds)))


def load_folder(path: str, image_size: int | None = None) -> Dataset:
    """Read anybody's images from a folder (``data.image_folder``); nothing is known of mirrored ones, so none are.

    Args:
        path: the folder.
        image_size: height and width to which the pictures are brought; None where all have one size.

    Raises:
        InputError: as ``read_image_folder``.
    """
    parts = read_image_folder(Path(path), image_size)
    digest = hashlib.sha256(repr(parts[2]).encode())
    for images, labels in parts[:2]:
        digest.update(repr(tuple(images.shape)).encode() + labels.numpy().tobytes())
        digest.update(images.numpy())
    dataset = _assemble(FOLDER + path, parts, None, False, sha256=digest.hexdigest(), image_size=image_size)
    announce(
        f"{len(dataset.train)} training and {len(dataset.test)} test images of {dataset.num_classes} classes, "
        f"{dataset.train.images.shape[2]}x{dataset.train.images.shape[1]} pixels"
    )
    return dataset


def _complaint(name: str) -> str | None:
    """Say what is wrong with the name of a dataset; None where nothing is."""
    if name in DATASETS or (name.startswith(FOLDER) and name != FOLDER):
        return None
    nearest = difflib.get_close_matches(name.lower(), DATASETS, 1)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return f"{quote(name)}: choose from {', '.join(DATASETS)}, {FOLDER}PATH{hint}"


def dataset_name(text: str) -> str:
    """An argparse type: the name of a dataset, or ``folder:PATH``.

    Raises:
        argparse.ArgumentTypeError: the text is anything else.
    """
    if complaint := _complaint(text):
        raise argparse.ArgumentTypeError(complaint)
    return text


def is_same_dataset(one: str, other: str) -> bool:
    """Say whether two names may mean the same images: a folder may lie elsewhere on another machine."""
    return one == other or (one.startswith(FOLDER) and other.startswith(FOLDER))


@dataclass(frozen=True)
class DataConfig(Config):
    """Which images."""

    dataset: str = setting(
        "cifar10",
        f"{', '.join(DATASETS)}, or {FOLDER}PATH with your own pictures in PATH/train/CLASS and PATH/test/CLASS; "
        "synthetic is generated, nothing to download",
        metavar="NAME",
        kind=dataset_name,
    )
    image_size: int | None = setting(
        None,
        "height and width, in pixels, to which the pictures of folder:PATH are cropped and resized; not needed where "
        "all have one size",
        Range(SMALLEST, 1024),
    )

    def __post_init__(self):
        super().__post_init__()
        if complaint := _complaint(self.dataset):
            raise ValueError(f"DataConfig.dataset = {complaint}")


@dataclass(frozen=True)
class FolderConfig(Config):
    """Where a run finds the images; a model card does not decide this."""

    data_dir: str = setting(
        "../data", "folder of the dataset's files; what is missing is downloaded to it", metavar="DIR"
    )


@dataclass(frozen=True)
class SourceConfig(FolderConfig):
    """Where a run finds the images and the split."""

    split_file: InputFile | None = setting(
        None,
        "a permutation of the training images, one index a line, such as the release's; needed for its published "
        "checkpoints (default: this project's own)",
        metavar="FILE",
    )


def load_dataset(
    name: str, root: str | Path, device: torch.device | str = "cpu", image_size: int | None = None
) -> Dataset:
    """Load a dataset by name and hold it on a device.

    Args:
        name: a key of ``DATASETS``, or ``folder:PATH``.
        root: folder of the files, for datasets that have any.
        device: where the images are kept.
        image_size: of a folder's pictures, as for ``load_folder``.

    Raises:
        InputError: the name is unknown, the files are missing or damaged, or the size is given for no folder.
    """
    if complaint := _complaint(name):
        raise InputError(f"--dataset {complaint}")
    if name.startswith(FOLDER):
        dataset = load_folder(name.removeprefix(FOLDER), image_size)
    elif image_size is not None:
        raise InputError(f"--image-size {image_size} has no effect with --dataset {name}; leave it out")
    else:
        dataset = DATASETS[name](root)
    return replace(dataset, train=dataset.train.to(device), test=dataset.test.to(device))
