"""Poisoned sets as folders of pictures: written to be looked at, read to bring in an attack from elsewhere.

A folder holds ``poisoned.csv``, the pictures it names, and, where the trigger is known, ``trigger_info.th``. The
columns are ``file`` (relative to the folder), ``label``, and, if known, ``index`` (of the training image it was made
from), ``original_label`` and ``poisoned`` (1 or 0).
"""

import csv
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from attacks.attack import Attack, PoisonedSet, Workspace
from data.datasets import ImageSet
from data.pictures import open_picture
from formats.trigger_file import load_trigger, save_trigger
from utils.config import InputFolder, setting
from utils.console import announce
from utils.errors import InputError, quote
from utils.files import as_json, read_json, read_text, write_bytes, write_text

TABLE, TRIGGER, RECIPE = "poisoned.csv", "trigger_info.th", "poisoned.json"
COLUMNS = ("file", "index", "label", "original_label", "poisoned")


def refuse_other_files(folder: Path) -> None:
    """Make sure, before any work is done, that an export would not be mixed with other files.

    Raises:
        InputError: files are there, and no export.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / TABLE).exists())):
        raise InputError(f"--export-poisoned {folder}: other files are there; choose another folder")


def export_poisoned(workspace: Workspace, poisoned: PoisonedSet, folder: Path) -> None:
    """Write a poisoned set as PNG files by class, with a table of what was done to which image.

    The folder appears when it is complete. One that holds the same set already, as when a run is repeated, stays.

    Args:
        workspace: of the run.
        poisoned: in the order of ``workspace.held``.
        folder: to be made.

    Raises:
        InputError: another set or other files are there.
        OSError: it cannot be written, or the disk is full.
    """
    rows = list(_rows(workspace, poisoned))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    folder = folder.absolute()
    refuse_other_files(folder)
    names = [row[0] for row in rows]
    recipe = {"sha256": _digest(text.getvalue(), poisoned)}
    if (folder / TABLE).exists():
        known = os.path.lexists(folder / RECIPE) and read_json(folder / RECIPE) == recipe
        if not known or not all((folder / name).is_file() for name in names):
            raise InputError(f"--export-poisoned {folder}: another set is there; choose another folder")
        return
    unfinished = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    steps = _write_pictures(unfinished, names, poisoned.train.images.cpu())
    for _ in workspace.track(steps, len(rows), 0, "exporting", "image"):
        pass
    if poisoned.trigger:
        trigger = poisoned.trigger.aimed_at(workspace.dataset.test)
        save_trigger(unfinished / TRIGGER, trigger, workspace.data_index(poisoned))
    write_bytes(unfinished / RECIPE, as_json(recipe))
    write_text(unfinished / TABLE, text.getvalue())
    unfinished.replace(folder)
    announce(
        f"exported {len(rows)} images to {folder}; train on them with --poison-type folder --poisoned-dir {folder}"
    )


def _digest(table: str, poisoned: PoisonedSet) -> str:
    """Return the sha256 that names a set: its table, its pixels and its trigger."""
    digest = hashlib.sha256(table.encode())
    digest.update(poisoned.train.images.cpu().numpy().tobytes())
    if poisoned.trigger:
        digest.update(repr((poisoned.trigger.alpha, poisoned.trigger.mode)).encode())
        for part in (poisoned.trigger.pattern, poisoned.trigger.mask):
            digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()


def _rows(workspace: Workspace, poisoned: PoisonedSet) -> Iterator[tuple]:
    marked = torch.zeros(len(poisoned.train), dtype=torch.int64)
    marked[poisoned.index] = 1
    original = workspace.train.labels
    for index, label, before, mark in torch.stack(
        [workspace.held, poisoned.train.labels.cpu(), original.cpu(), marked], 1
    ).tolist():
        yield f"{label}/{index:05d}.png", index, label, before, mark


def _write_pictures(folder: Path, names: list[str], images: Tensor) -> Iterator[str]:
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(image.numpy()).save(buffer, format="png")
        write_bytes(folder / name, buffer.getvalue())
        yield name


@dataclass(frozen=True)
class ImageFolder(Attack):
    """A poisoned set as pictures, made by any attack."""

    poisons_once: ClassVar[bool] = False  # it is a folder already

    poisoned_dir: InputFolder | None = setting(
        None,
        "a poisoned set as pictures, as --export-poisoned writes it: poisoned.csv, its pictures, trigger_info.th",
        metavar="DIR",
    )

    @classmethod
    def from_given(cls, given: dict[str, Any]) -> "ImageFolder":
        """See ``Attack``; raises ``ValueError`` where no folder is named."""
        if not given.get("poisoned_dir"):
            raise ValueError(f"--poison-type folder needs --poisoned-dir DIR with {TABLE} and the pictures it names")
        return cls(**given)

    def carry_out(self, workspace: Workspace) -> PoisonedSet:
        """Read the set; images made from the defender's held-out ones are left out.

        Raises:
            InputError: the table or a picture is missing or damaged, a picture has another size than the dataset's, a
                label or an index is out of range or repeats, an original label is not the dataset's, or the trigger
                file is not one.
        """
        folder, clean = Path(self.poisoned_dir), workspace.dataset.train
        rows = _read_table(folder / TABLE)
        labels = _whole_numbers(rows, "label", clean.num_classes, folder)
        keep, poisoned, index = _known_images(rows, workspace, folder)
        names = [row["file"] for row, kept in zip(rows, keep.tolist(), strict=True) if kept]
        if len(names) < 2:
            raise InputError(f"{folder / TABLE}: names {len(names)} images to train on")
        images = torch.empty(len(names), *clean.images.shape[1:], dtype=torch.uint8)
        for _ in workspace.track(_read_pictures(folder, names, images), len(names), 0, "reading", "image"):
            pass
        trigger = None
        if os.path.lexists(folder / TRIGGER):
            trigger = load_trigger(folder / TRIGGER, clean.num_classes)
        else:
            announce(f"{folder}: no {TRIGGER}, so the attack success rate is not known")
        train = ImageSet(images, labels[keep], clean.num_classes).to(clean.images.device)
        return PoisonedSet(train, trigger, poisoned[keep].nonzero().flatten(), None if index is None else index[keep])


def _known_images(
    rows: list[dict[str, str]], workspace: Workspace, folder: Path
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return which pictures the attacker may use, which are poisoned, bool each, and their indices, if known."""
    everything, nothing = torch.ones(len(rows), dtype=torch.bool), torch.zeros(len(rows), dtype=torch.bool)
    if "index" not in rows[0]:
        announce(f"{folder / TABLE}: no column index, so the defender's images may be among those trained on")
        return everything, nothing, None
    clean = workspace.dataset.train
    index = _whole_numbers(rows, "index", len(clean), folder)
    if len(index.unique()) < len(index):
        raise InputError(f"{folder / TABLE}: an index repeats; expected each training image at most once")
    if "original_label" in rows[0]:
        original = _whole_numbers(rows, "original_label", clean.num_classes, folder)
        if not torch.equal(original, clean.labels.cpu()[index]):
            raise InputError(f"{folder / TABLE}: original_label differs from {workspace.dataset.name}; see --dataset")
    keep = torch.isin(index, workspace.held)
    announce(f"{folder}: {int((~keep).sum())} of {len(rows)} images are held out from the attacker and left out")
    poisoned = _whole_numbers(rows, "poisoned", 2, folder).bool() if "poisoned" in rows[0] else nothing
    return keep, poisoned, index


def _read_table(path: Path) -> list[dict[str, str]]:
    text = read_text(path)
    try:
        table = csv.DictReader(io.StringIO(text, newline=""))
        rows = list(table)
    except csv.Error as error:
        raise InputError(f"{path}: {error}; expected a table of pictures") from error
    if len(set(table.fieldnames or ())) < len(table.fieldnames or ()):
        raise InputError(f"{path}: a column name repeats in {quote(table.fieldnames)}")
    if not rows or not {"file", "label"} <= rows[0].keys() or any(None in row.values() or None in row for row in rows):
        raise InputError(f"{path}: expected a header with the columns file, label [, index, poisoned] and full rows")
    return rows


def _whole_numbers(rows: list[dict[str, str]], column: str, end: int, folder: Path) -> Tensor:
    """Return a column as int64, each value in 0..end-1."""
    try:
        values = np.array([int(row[column]) for row in rows], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{folder / TABLE}: {column} is not a whole number everywhere") from error
    outside = values[(values < 0) | (values >= end)]
    if len(outside):
        raise InputError(f"{folder / TABLE}: {column} {outside[0]} is outside 0..{end - 1}")
    return torch.from_numpy(values)


def _read_pictures(folder: Path, names: list[str], images: Tensor) -> Iterator[str]:
    for number, name in enumerate(names):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{folder / TABLE}: file {quote(name)} is outside the folder")
        images[number] = _read_picture(folder / name, images.shape[1], images.shape[2])
        yield name


def _read_picture(path: Path, height: int, width: int) -> Tensor:
    """Read one picture of this size, in RGB; others are not even decoded."""
    with open_picture(path) as picture:
        found, expected = (f"{w}x{h} {mode}" for w, h, mode in ((*picture.size, picture.mode), (width, height, "RGB")))
        if found != expected:
            raise InputError(f"{path}: {found} pixels, expected {expected}")
        return torch.from_numpy(np.array(picture))
