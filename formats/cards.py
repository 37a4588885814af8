"""Model cards: a small JSON file beside each checkpoint says what it is, so that no flag has to be repeated."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any

from data.datasets import MEANS, STDS, Normalization
from utils.config import Range
from utils.errors import InputError, quote
from utils.files import as_json, as_torch, card_path, read_json, sha256_of, write_together

CARD_VERSION = 1


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
    if not os.path.lexists(card_file):  # a link that leads nowhere is there, and is refused
        return None
    card = read_json(card_file)
    missing = [name for name in ("card_version", "sha256") if name not in card]
    if fault := wrong_entry(card) or (f"no {missing[0]}" if missing else None):
        raise InputError(f"{card_file}: not a card ({fault}); move it away and give --arch and other flags")
    if card["card_version"] != CARD_VERSION:
        raise InputError(f"{card_file}: card version {card['card_version']}, but only {CARD_VERSION} is known here")
    found, expected = sha256_of(path), card["sha256"]
    if found != expected:
        raise InputError(
            f"{path}: sha256 {found[:12]}... is not the {expected[:12]}... of its card {card_file.name}; "
            "the file was damaged or replaced (move the card away if it was replaced)"
        )
    return card


def wrong_entry(card: dict[str, Any]) -> str | None:
    """Say which entry of a card is none of the kind it has to be; None where all are."""
    wrong = [name for name, is_right in _ENTRIES.items() if name in card and not is_right(card[name])]
    return f"{wrong[0]} is {quote(card[wrong[0]])}" if wrong else None


def is_compact(card: dict[str, Any]) -> bool:
    """Say whether channels were dropped from the network of a card, so that its layers are narrower than built."""
    return card.get("compact", False)


def normalization_of(path: str | Path, card: dict[str, Any]) -> Normalization:
    """Return the normalisation that a card names; raises ``InputError`` where one of its parts is missing."""
    known = card["normalization"]
    if known.keys() != {"mean", "std"}:
        raise InputError(f"{path}: the normalization of its card needs mean and std")
    return Normalization(tuple(known["mean"]), tuple(known["std"]))


def _is_number_in(within: Range) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and value in within


def _is_three_in(within: Range) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) == 3 and all(map(_is_number_in(within), value))


def _is_normalization(value: Any) -> bool:
    checks = {"mean": _is_three_in(MEANS), "std": _is_three_in(STDS)}
    return isinstance(value, dict) and all(name in checks and checks[name](part) for name, part in value.items())


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_held_out(value: Any) -> bool:
    names = {"val_frac", "val_split"}
    return isinstance(value, dict) and value.keys() == names and all(map(_is_number_in(Range(0, 0.5)), value.values()))


def _is_metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(type(figure) in (int, float) for figure in value.values())


def _is_split(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("file"), (str, NoneType)) and isinstance(value.get("sha256"), (str, NoneType))


# The entries that are used when a card is read, and what they have to be.
_ENTRIES: dict[str, Callable[[Any], bool]] = {
    "card_version": lambda value: type(value) is int,
    "sha256": _is_text,
    "checkpoint_sha256": _is_text,
    "arch": _is_text,
    "model": _is_text,
    "dataset": _is_text,
    "dataset_sha256": _is_text,
    "classes": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "image_size": lambda value: value is None or type(value) is int,
    "num_classes": lambda value: type(value) is int and value > 0,
    "widen_factor": _is_number_in(Range(0, 64, open_low=True)),
    "normalization": _is_normalization,
    "attack": lambda value: isinstance(value, (dict, NoneType)),
    "split": _is_split,
    "held_out": _is_held_out,
    "compact": lambda value: isinstance(value, bool),
    "command": _is_text,
    "metrics": _is_metrics,
    "metrics_before_rounding": _is_metrics,
}
