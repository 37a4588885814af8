"""``generators.th``: the generators of an input-aware attack, from which the trigger of any image can be drawn."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.datasets import ImageSet
from data.triggers import Trigger, next_class
from engine.generated import drawn_trigger
from formats.cards import normalization_of, read_card, wrong_entry
from formats.checkpoints import load_strictly
from models.generator import Generator
from utils.errors import InputError, quote

PARTS = {"pattern": 3, "mask": 1}  # and their output channels
WIDTH = 32  # of the published generators' first layer


def is_generators(content: Any) -> bool:
    """Say whether what ``load_torch`` returned are generators."""
    names = content.keys() if isinstance(content, dict) else ()
    return bool(names) and all(str(name).partition(".")[0] in PARTS for name in names)


def draw_from(path: str | Path, content: dict[str, Any], images: ImageSet) -> Trigger:
    """Draw the trigger of each image, in float32.

    Args:
        path: the file; its card says which class the attack leads to and how the generators' input is normalised.
        content: what ``load_torch`` returned.
        images: the clean test images.

    Raises:
        InputError: there is no card, it does not say what it has to, or the weights are no generators'.
    """
    card = read_card(path)
    known = (card or {}).get("trained_with")
    if not isinstance(known, dict) or wrong_entry(known) or not {"attack", "normalization"} <= known.keys():
        raise InputError(f"{path}: generators need the card that step 1 writes beside them; it names the target class")
    normalization = normalization_of(path, known)
    nets = [_load(path, name, content).to(images.images.device) for name in PARTS]
    return drawn_trigger(*nets, images, _targets(path, known["attack"] or {}, images), normalization, torch.float32)


def _load(path: str | Path, name: str, content: dict[str, Any]) -> Generator:
    """Return one of the generators, as wide as its first layer."""
    weights = {key.removeprefix(f"{name}."): value for key, value in content.items() if key.startswith(f"{name}.")}
    first = weights.get("layers.0.weight")
    if not isinstance(first, Tensor) or first.dim() != 4 or not 0 < len(first) <= 8 * WIDTH:
        raise InputError(f"{path}: no {name} generator in it")
    network = Generator(PARTS[name], len(first) / WIDTH)
    load_strictly(network, weights, path)
    return network


def _targets(path: str | Path, attack: dict[str, Any], images: ImageSet) -> Tensor:
    if attack.get("poison_type") == "iab-all":
        return next_class(images)
    target = attack.get("poison_target")
    if type(target) is not int or not 0 <= target < images.num_classes:
        raise InputError(f"{path}: its card names the target {quote(target)}, expected 0 to {images.num_classes - 1}")
    return torch.full_like(images.labels, target)
