"""Anybody's images: pictures in a folder for each class, below ``train`` and ``test`` (or ``val``)."""

from pathlib import Path

import torch
from torch import Tensor

from data.pictures import crop_to_fit, list_folder, list_pictures, read_pictures, read_size
from utils.console import announce
from utils.errors import InputError, quote

MOST_CLASSES = 1000  # their names stand in every card
SMALLEST = 16  # pixels; below, the last maps of a network would be single pixels, of which BatchNorm knows no variance
FEWEST = 10  # training images; of fewer, the tenth that the attacker never sees would be none
TESTS = ("test", "val")
Labelled = tuple[Tensor, Tensor]


def _list_classes(folder: Path) -> tuple[dict[str, list[Path]], list[Path]]:
    """Return the pictures of each class, and what is left out."""
    names, other = list_folder(folder)
    if not 2 <= len(names) <= MOST_CLASSES:
        raise InputError(
            f"{folder}: {len(names)} folders, expected one for each of 2 to {MOST_CLASSES} classes, with its pictures"
        )
    odd = [name for name in names if not name.isprintable()]
    if odd:
        raise InputError(f"{folder}: {quote(odd[0])} is no printable name of a class; rename the folder")
    found = {name: list_pictures(folder / name) for name in names}
    left_out = [folder / name for name in other] + [path for _, others in found.values() for path in others]
    return {name: pictures for name, (pictures, _) in found.items()}, left_out


def _labels(classes: dict[str, list[Path]]) -> Tensor:
    return torch.tensor([label for label, paths in enumerate(classes.values()) for _ in paths])


def _find_parts(folder: Path) -> tuple[Path, Path]:
    """Return the folders of the training and of the test images."""
    if not folder.is_dir():
        raise InputError(f"{folder.absolute()}: no such folder; --dataset folder:PATH says where the pictures are")
    names, _ = list_folder(folder)
    tests = [name for name in TESTS if name in names]
    if "train" not in names or not tests:
        raise InputError(
            f"{folder.absolute()}: expected the folders train and test (or val), with a folder of pictures for each "
            "class in both"
        )
    return folder / "train", folder / tests[0]


def read_image_folder(folder: Path, image_size: int | None = None) -> tuple[Labelled, Labelled, tuple[str, ...]]:
    """Read ``train/CLASS/*`` and ``test/CLASS/*`` (or ``val``); classes and pictures are sorted by name.

    Args:
        folder: holds both.
        image_size: height and width, in pixels, to which all pictures are cropped and resized; None where they have
            one size, and keep it.

    Returns:
        Training images and test images, uint8 (N, H, W, 3) with their labels, int64 (N,), and the names of the classes.

    Raises:
        InputError: a folder is missing, empty or too large for the memory, the classes of both parts differ, or a
            picture is damaged or of another size than the first.
    """
    announce(f"reading the pictures of {folder.absolute()}")
    places = _find_parts(folder)
    (train, left_out), (test, more_left_out) = (_list_classes(place) for place in places)
    other = sorted(train.keys() ^ test.keys())
    if other:
        raise InputError(f"{folder}: the class {quote(other[0])} is only in one of {places[0].name}, {places[1].name}")
    if left_out := left_out + more_left_out:
        announce(f"left out as no pictures: {len(left_out)} files or folders, such as {left_out[0]}")
    paths = [path for part in (train, test) for pictures in part.values() for path in pictures]
    size = (image_size, image_size) if image_size else read_size(paths[0])
    if min(size) < SMALLEST:
        raise InputError(f"{paths[0]}: {size[0]}x{size[1]} pixels, too small; --image-size {SMALLEST} enlarges all")
    labels = _labels(train), _labels(test)
    if len(labels[0]) < FEWEST:
        raise InputError(f"{places[0]}: {len(labels[0])} pictures, expected {FEWEST} or more to train on")
    hint = f"but {paths[0]} has {size[0]}x{size[1]}; --image-size N brings all to NxN"
    images = read_pictures(paths, size, hint, crop_to_fit if image_size else None)
    count = len(labels[0])
    return (images[:count], labels[0]), (images[count:], labels[1]), tuple(train)
