"""Model cards: a small JSON file beside each checkpoint says what it is, so that no flag has to be repeated."""

import json
from pathlib import Path
from typing import Any

from data.errors import InputError
from utils.files import save_torch, sha256_of, write_json

CARD_VERSION = 1


def card_path(checkpoint: str | Path) -> Path:
    """Return where a checkpoint's card lies: the same name, ending in .json."""
    return Path(checkpoint).with_suffix(".json")


def save_with_card(path: str | Path, state_dict: dict, card: dict[str, Any]) -> None:
    """Save a state_dict and its card; the card names the sha256 of the file.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    card_path(path).unlink(missing_ok=True)  # a card of an older file must never describe the new one
    save_torch(path, {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()})
    write_json(card_path(path), {"card_version": CARD_VERSION, "sha256": sha256_of(path), **card})


def read_card(checkpoint: str | Path) -> dict[str, Any] | None:
    """Read the card beside a checkpoint; None where there is none.

    Raises:
        InputError: the card is no JSON object, or was written for other bytes than the checkpoint's.
    """
    path = card_path(checkpoint)
    if not path.exists():
        return None
    try:
        card = json.loads(path.read_text())
        expected = card["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a model card ({error}); delete it and give --arch and the other flags"
        ) from error
    found = sha256_of(checkpoint)
    if found != expected:
        raise InputError(
            f"{checkpoint}: sha256 {found[:12]}... is not the {expected[:12]}... of its card {path.name}; "
            "the file was damaged or replaced (delete the card if it was replaced)"
        )
    return card
