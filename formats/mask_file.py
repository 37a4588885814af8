"""``mask_values.txt``: every neuron with its mask, in the text format that the release and three toolkits share."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from formats.cards import read_card, write_with_card
from models.neuron_layers import neuron_layers
from models.neurons import MASK_DECIMALS, Neuron
from utils.config import Config, InputFile, required
from utils.errors import InputError, quote, shorten
from utils.files import read_text

HEADER = ("No", "Layer Name", "Neuron Idx", "Mask Score")
SEPARATOR = " \t "


@dataclass(frozen=True)
class MaskFileConfig(Config):
    """The masks to prune by."""

    mask_file: InputFile = required(
        "mask_values.txt of step 2: a file, an address, or a name from the zoo", metavar="FILE"
    )


def write_masks(path: str | Path, neurons: list[Neuron], checkpoint_sha256: str) -> None:
    """Write neurons in state_dict order, masks with 4 decimals, and a card that says which checkpoint they belong to.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    rows = [HEADER]
    rows += [(str(n), layer, str(i), f"{mask:.{MASK_DECIMALS}f}") for n, (layer, i, mask) in enumerate(neurons)]
    text = "".join(SEPARATOR.join(row) + " \n" for row in rows)
    write_with_card(path, text.encode(), {"checkpoint_sha256": checkpoint_sha256})


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
