"""Triggered test images from a folder, for attacks whose trigger nobody can name.

Either ``labels.csv`` with the columns ``file`` (relative to the folder), ``target`` and, if known, ``label``, the true
class; or BackdoorBench's ``bd_test_dataset``, pictures named ``LABEL/INDEX.png``, with ``attack_result.pt`` beside the
folder, which holds the target of each.
"""

import csv
import io
import os
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch

from data.datasets import ImageSet
from data.pictures import read_pictures
from data.triggers import TriggeredSet
from utils.console import announce
from utils.errors import InputError, quote
from utils.files import load_torch, read_text

TABLE, RESULT = "labels.csv", "attack_result.pt"


class Row(NamedTuple):
    """A picture, the class that the attacker wants for it, and the true one; None where it is not known."""

    file: str
    target: int
    label: int | None


def load_triggered_folder(folder: str | Path, test: ImageSet) -> TriggeredSet:
    """Read triggered images; those whose true class is the target are left out, as the attack has no part in them.

    Args:
        folder: see above.
        test: the clean test images; size and number of classes have to be theirs.

    Raises:
        InputError: the folder has neither a table nor BackdoorBench's layout; the table, or what it says, is wrong; a
            picture is missing, damaged, of another size or outside the folder; no picture is left.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if os.path.lexists(folder / TABLE):
        source = folder / TABLE
        rows = _read_table(source, test.num_classes)
    elif os.path.lexists(folder.absolute().parent / RESULT):
        source = folder.absolute().parent / RESULT
        rows = _read_result(source, test.num_classes)
    else:
        raise InputError(f"{folder}: expected {TABLE} in it (columns file, target, label), or {RESULT} beside it")
    judged = [row for row in rows if row.label != row.target]
    if len(judged) < len(rows):
        announce(f"{folder}: {len(rows) - len(judged)} of {len(rows)} pictures are of their target class and left out")
    if not judged:
        raise InputError(f"{source}: every picture is of its target class; the attack's success cannot be measured")
    if judged[0].label is None:
        announce(f"{source}: the true classes are not known, and so neither is R-Acc")
    height, width = test.images.shape[1:3]
    paths = [_inside(folder, row.file, source) for row in judged]
    images = read_pictures(paths, (width, height), f"but the test images have {width}x{height}")
    device = test.images.device
    known = [row.label for row in judged if row.label is not None]
    return TriggeredSet(
        images.to(device),
        torch.tensor([row.target for row in judged], device=device),
        test.num_classes,
        torch.tensor(known, device=device) if known else None,
    )


def _inside(folder: Path, name: str, source: Path) -> Path:
    """Return the path of a picture; raises ``InputError`` where it, or what it links to, is outside the folder."""
    try:
        outside = PurePath(name).is_absolute() or ".." in PurePath(name).parts or not name
        if not outside and (folder / name).resolve().is_relative_to(folder.resolve()):
            return folder / name
    except (OSError, ValueError, RuntimeError) as error:  # a name with a NUL, links in a circle
        raise InputError(f"{source}: file {quote(name)} cannot be read") from error
    raise InputError(f"{source}: file {quote(name)} is outside the folder")


def _read_table(path: Path, num_classes: int) -> list[Row]:
    try:
        table = csv.DictReader(io.StringIO(read_text(path), newline=""))
        lines = list(table)
    except csv.Error as error:
        raise InputError(f"{path}: {error}; expected a table of pictures") from error
    names = table.fieldnames or []
    if not {"file", "target"} <= set(names) or len(set(names)) < len(names):
        raise InputError(
            f"{path}: expected a header with the columns file, target and, if known, label; got {quote(names)}"
        )
    if not lines:
        raise InputError(f"{path}: names no picture")
    if any(None in line or None in line.values() for line in lines):
        raise InputError(f"{path}: a row has more or fewer columns than the header")
    return [
        Row(
            line["file"],
            _class_of(line["target"], "target", num_classes, path),
            _class_of(line["label"], "label", num_classes, path) if "label" in names else None,
        )
        for line in lines
    ]


def _class_of(value: Any, what: str, num_classes: int, path: Path) -> int:
    try:
        number = int(value)
        if number == float(value) and 0 <= number < num_classes:
            return number
    except (TypeError, ValueError, OverflowError):
        pass  # said below
    raise InputError(f"{path}: {what} {quote(value)} is no class; there are {num_classes}, from 0 to {num_classes - 1}")


def _read_result(path: Path, num_classes: int) -> list[Row]:
    """Return the triggered test pictures of BackdoorBench; the paths in its file are those of another machine."""
    content = load_torch(path)
    try:
        entries = content["bd_test"]["bd_data_container"]["data_dict"].items()
        found = [(index, entry["other_info"][0], entry["other_info"][1]) for index, entry in entries]
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its bd_test names no pictures in a folder; write {TABLE} into the folder") from error
    if not found:
        raise InputError(f"{path}: its bd_test names no picture")
    rows = []
    for index, target, label in found:
        number = _class_of(index, "index", 2**31, path)
        true = _class_of(label, "label", num_classes, path)
        rows.append(Row(f"{true}/{number}.png", _class_of(target, "target", num_classes, path), true))
    return rows
