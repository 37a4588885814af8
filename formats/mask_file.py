"""``mask_values.txt``: every neuron with its mask, in the text format that the release and three toolkits share."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from formats.cards import read_card, write_with_card
from models.neuron_layers import neuron_layers
from models.neurons import MASK_DECIMALS, Neuron
from utils.config import Config, InputFile, Range, required, setting
from utils.errors import InputError, quote, shorten
from utils.files import read_text

MOST_HELD_OUT = 0.5  # share of the clean images
HEADER = ("No", "Layer Name", "Neuron Idx", "Mask Score")
SEPARATOR = " \t "


@dataclass(frozen=True)
class MaskFileConfig(Config):
    """The masks to prune by."""

    mask_file: InputFile = required(
        "mask_values.txt of step 2: a file, an address, or a name from the zoo", metavar="FILE"
    )
    val_split: float | None = setting(
        None, "share of the clean images that step 2 held out; a card beside the masks says it", Range(0, MOST_HELD_OUT)
    )


def write_masks(
    path: str | Path, neurons: list[Neuron], checkpoint_sha256: str, held_out: dict[str, float] | None = None
) -> None:
    """Write neurons in state_dict order, masks with 4 decimals, and a card that says which checkpoint they belong to.

    Args:
        path: the text file.
        neurons: in state_dict order.
        checkpoint_sha256: of the network's file.
        held_out: ``val_frac`` and ``val_split``, which of the clean images the masks have not seen; None: they saw all.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    rows = [HEADER]
    rows += [(str(n), layer, str(i), f"{mask:.{MASK_DECIMALS}f}") for n, (layer, i, mask) in enumerate(neurons)]
    text = "".join(SEPARATOR.join(row) + " \n" for row in rows)
    seen = {"held_out": held_out} if held_out else {}
    write_with_card(path, text.encode(), {"checkpoint_sha256": checkpoint_sha256, **seen})


def held_out_share(path: str | Path, val_frac: float, val_split: float | None) -> float:
    """Return which share of the clean images a mask file has not seen: what its card says, or else the user.

    Args:
        path: the mask file.
        val_frac: the defender's clean images, as in ``SubjectConfig``.
        val_split: what the user says; None: nothing.

    Raises:
        InputError: the user says something else than the card, or as ``read_card``.
    """
    card = read_card(path) if os.path.lexists(path) else None
    if card is None:
        return val_split or 0.0
    held_out = card.get("held_out", {"val_split": 0.0})
    for name, given in {"val_frac": val_frac, "val_split": val_split}.items():
        if given is not None and given != held_out.get(name, given):
            raise InputError(f"{path}: learnt with --{name.replace('_', '-')} {held_out[name]:g}, not {given:g}")
    return held_out["val_split"]


def check_source(path: str | Path, checkpoint_sha256: str) -> None:
    """Make sure that a mask file with a card was learnt on this checkpoint.

    Raises:
        InputError: the card names another checkpoint, or the file was changed since.
    """
    card = read_card(path)
    if card is not None and card.get("checkpoint_sha256") != checkpoint_sha256:
        raise InputError(f"{path}: these masks were learnt on another checkpoint; run step 2 on this one")


def parse_masks(path: str | Path) -> list[Neuron]:
    """Read a mask file without its network.

    Returns:
        The neurons in file order.

    Raises:
        InputError: the file is missing or damaged, or holds no neuron.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file; step 2 (optimize_mask_cifar.py) writes it")
    lines = read_text(path).rstrip().splitlines()
    if not lines or tuple(word.strip() for word in lines[0].split("\t")) != HEADER:
        raise InputError(f"{path}: not a mask file; the first line must be {SEPARATOR.join(HEADER)!r}")
    neurons = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            _, layer, index, mask = (word.strip() for word in line.split("\t"))
            neurons.append(Neuron(layer, int(index), float(mask)))
        except ValueError as error:
            raise InputError(
                f"{path}: line {number} is {quote(line)}, expected number, layer, channel and mask"
            ) from error
        if not 0 <= neurons[-1].mask <= 1:
            raise InputError(f"{path}: line {number}: mask {shorten(mask)} is outside 0..1")
    if not neurons:
        raise InputError(f"{path}: names no neuron")
    return neurons


def read_masks(path: str | Path, network: nn.Module) -> list[Neuron]:
    """Read a mask file and make sure that it names every neuron of the network once.

    Args:
        path: the file.
        network: the network that is to be pruned.

    Returns:
        The neurons in file order.

    Raises:
        InputError: the file is missing or damaged, or was made for another network.
    """
    neurons = parse_masks(path)
    found = {(neuron.layer, neuron.index) for neuron in neurons}
    own = {(name, index) for name, layer in neuron_layers(network).items() for index in range(len(layer.weight))}
    if found != own or len(neurons) != len(own):
        repeated = [key for key, count in Counter((n.layer, n.index) for n in neurons).items() if count > 1]
        strange = sorted(found ^ own)[:1] or repeated
        raise InputError(
            f"{path}: {len(neurons)} neurons, but the network has {len(own)} (first difference: "
            f"{shorten(strange[0][0])} {shorten(str(strange[0][1]))}); was it made for another architecture or width?"
        )
    return neurons
