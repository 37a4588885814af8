"""One permutation of the training images decides what the defender holds and what the attacker trains on."""

import hashlib
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.errors import InputError
from utils.files import read_text
from utils.seeding import seeded_generator

SPLIT_SEED = 0  # the same for every run, so that runs of different --seed share one split
HELD_OUT = 0.1  # share of the training images that step 1 never trains on


def draw_permutation(size: int) -> Tensor:
    """Draw this project's permutation of ``size`` training images: int64 (size,), always the same."""
    return torch.randperm(size, generator=seeded_generator(SPLIT_SEED, "split", size))


def read_permutation(path: str | Path, size: int) -> Tensor:
    """Read a permutation in the ANP release's format: one index a line.

    Args:
        path: the text file.
        size: number of training images.

    Returns:
        int64 (size,).

    Raises:
        InputError: the file cannot be read, or is no permutation of 0..size-1.
    """
    text = read_text(path)
    try:
        entries = np.array([int(word) for word in text.split()], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise InputError(f"split file {path}: expected {size} whole numbers, one a line") from error
    if len(entries) != size:
        raise InputError(f"split file {path}: {len(entries)} entries, but the dataset has {size} training images")
    outside = entries[(entries < 0) | (entries >= size)]
    if len(outside):
        raise InputError(f"split file {path}: index {outside[0]} is outside 0..{size - 1}")
    if len(np.unique(entries)) != size:
        raise InputError(f"split file {path}: indices repeat; expected each of 0..{size - 1} once")
    return torch.from_numpy(entries)


def load_permutation(path: str | Path | None, size: int) -> Tensor:
    """Return the permutation of a split file, or this project's own where there is none.

    Raises:
        InputError: as ``read_permutation``.
    """
    return read_permutation(path, size) if path else draw_permutation(size)


def absolute(path: str | None) -> str | None:
    """Return a split file's path as a model card names it, so that it is found from any folder."""
    return str(Path(path).absolute()) if path else None


def permutation_digest(permutation: Tensor) -> str:
    """Return the sha256 that names a permutation in model cards."""
    return hashlib.sha256(permutation.numpy().tobytes()).hexdigest()


def split_size(fraction: float, size: int) -> int:
    """Return how many of ``size`` images a share is: int(fraction * size), computed in exact decimals."""
    return int(Decimal(str(fraction)) * size)


def attacker_index(permutation: Tensor) -> Tensor:
    """Return the indices step 1 trains on: all but the first ``HELD_OUT`` of the permutation."""
    return permutation[split_size(HELD_OUT, len(permutation)) :]


def defender_index(permutation: Tensor, fraction: float) -> Tensor:
    """Return the indices of the defender's clean images: the first ``fraction`` of the permutation.

    Args:
        permutation: int64 (N,).
        fraction: share of the N images, above 0 and at most ``HELD_OUT``.

    Raises:
        InputError: the share is so small that no image is left, or reaches into the attacker's images.
    """
    if fraction > HELD_OUT:
        raise InputError(f"--val-frac {fraction} reaches into the attacker's images; it may be {HELD_OUT} at most")
    count = split_size(fraction, len(permutation))
    if count < 1:
        raise InputError(f"--val-frac {fraction} of {len(permutation)} training images leaves none; use more")
    return permutation[:count]
