"""Model cards: a small JSON file beside each checkpoint says what it is, so that no flag has to be repeated."""

import hashlib
import json
from pathlib import Path
from types import NoneType
from typing import Any

from utils.errors import InputError
from utils.files import as_json, as_torch, sha256_of, write_together

CARD_VERSION = 1


def card_path(checkpoint: str | Path) -> Path:
    """Return where a checkpoint's card lies: the same name, ending in .json."""
    return Path(checkpoint).with_suffix(".json")


def write_with_card(path: str | Path, content: bytes, card: dict[str, Any]) -> None:
    """Write a file and its card, which names the file's sha256.

    The card appears first, so that a run killed between the two leaves no file without a card; an older file beside a
    newer card is refused when it is read.

    Raises:
        OSError: the folder cannot be written or the disk is full; older files are then untouched.
    """
    digest = hashlib.sha256(content).hexdigest()
    described = as_json({"card_version": CARD_VERSION, "sha256": digest, **card})
    write_together({card_path(path): described, Path(path): content})


def save_with_card(path: str | Path, state_dict: dict, card: dict[str, Any]) -> None:
    """Save a state_dict and its card; raises as ``write_with_card``."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    write_with_card(path, as_torch(plain), card)


def read_card(path: str | Path) -> dict[str, Any] | None:
    """Read the card beside a file; None where there is none.

    Raises:
        InputError: the card is no card of this version, has an entry of the wrong type, or was written for other
            bytes than the file's.
    """
    card_file = card_path(path)
    if not card_file.exists():
        return None
    try:
        card = json.loads(card_file.read_text())
        version, expected = card["card_version"], card["sha256"]
        _check_types(card)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{card_file}: not a card ({error}); move it away and give --arch and other flags") from error
    if version != CARD_VERSION:
        raise InputError(f"{card_file}: card version {version}, but only {CARD_VERSION} is known here")
    found = sha256_of(path)
    if found != expected:
        raise InputError(
            f"{path}: sha256 {found[:12]}... is not the {str(expected)[:12]}... of its card {card_file.name}; "
            "the file was damaged or replaced (move the card away if it was replaced)"
        )
    return card


def _check_types(card: dict[str, Any]) -> None:
    """Raise ``TypeError`` or ``ValueError`` where an entry that is used later has the wrong type or range."""
    mean, std = (card.get("normalization", {}).get(name, [0.5] * 3) for name in ("mean", "std"))
    checks = {
        "arch": isinstance(card.get("arch", ""), str),
        "dataset": isinstance(card.get("dataset", ""), str),
        "num_classes": type(card.get("num_classes", 10)) is int and card.get("num_classes", 10) > 0,
        "widen_factor": type(card.get("widen_factor", 1.0)) in (int, float) and 0 < card.get("widen_factor", 1.0) <= 64,
        "normalization": len(mean) == len(std) == 3 and min(map(float, mean)) >= 0 and min(map(float, std)) > 0,
        "attack": isinstance(card.get("attack"), (dict, NoneType)),
        "split": isinstance(card.get("split", {}).get("file"), (str, NoneType)),
    }
    wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise ValueError(f"{wrong[0]} is {card[wrong[0]]!r}")
