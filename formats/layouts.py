"""Checkpoints as toolkits lay them out: where the weights lie, what they are called, what input they expect.

A reader is a function ``read(content) -> Checkpoint | None``; the first that knows a content wins.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data.datasets import CIFAR10_NORMALIZATION, Normalization
from models.recognise import recognise
from utils.errors import InputError
from utils.files import load_torch, save_torch, sha256_of

WRAPPERS = ("state_dict", "model", "net", "netC", "model_state", "model_state_dict")
PREFIXES = ("module.", "model.", "net.", "_orig_mod.")  # the last one is torch.compile's
AVERAGED = "n_averaged"  # of stochastic weight averaging (torch.optim.swa_utils), beside weights below ``module.``
TROJANZOO = "trojanzoo"  # the one that has other names for the same networks
BARE = "bare"  # weights and nothing else, by their names here, as this project writes them
KNOWN = (
    "a bare state_dict (the release, backdoor-toolbox, BackdoorBox, trojanzoo), RNP, BackdoorBench's attack_result.pt, "
    f"the input-aware release, or a state_dict under {', '.join(WRAPPERS)}"
)

WANET = Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261))
RAW = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
# What the networks of a toolkit expect, by dataset. Trojanzoo's take raw pixels and normalise them themselves, with
# these numbers; the networks here leave that to whoever calls them.
NORMALIZATIONS: dict[str, dict[str, Normalization]] = {
    "backdoorbench": {
        "cifar10": WANET,
        "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "tiny-imagenet-200": Normalization((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
        "gtsrb": RAW,
    },
    "input-aware": {"cifar10": WANET, "gtsrb": RAW},
    "rnp": {"cifar10": CIFAR10_NORMALIZATION},
    "trojanzoo": {"cifar10": Normalization((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768))},
}


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, whoever wrote it.

    Attributes:
        layout: its name; ``bare`` is this project's own.
        state_dict: the weights, by their names here.
        names: the file's name of each weight, by its name here.
        place: the keys under which the weights lie in the content.
        content: all of it.
    """

    layout: str
    state_dict: dict[str, Tensor]
    names: dict[str, str]
    place: tuple[str, ...]
    content: Any

    def normalization(self, dataset: str) -> Normalization | None:
        """Return what the toolkit's networks for a dataset expect; None where the layout does not say."""
        return NORMALIZATIONS.get(self.layout, {}).get(dataset)

    @property
    def num_classes(self) -> int | None:
        """What the file itself says beside the weights; None where it says nothing."""
        said = self.content.get("num_classes") if self.layout == "backdoorbench" else None
        return said if type(said) is int else None

    def with_weights(self, state_dict: dict[str, Tensor]) -> Any:
        """Return the content with other weights, in the data types of the old ones; all else is the same.

        Args:
            state_dict: every weight, by its name here.
        """
        return _replaced(self.content, self.place, {self.names[name]: tensor for name, tensor in state_dict.items()})


def _replaced(content: Any, place: tuple[str, ...], weights: dict[str, Tensor]) -> Any:
    changed = copy.copy(content)
    if place:
        changed[place[0]] = _replaced(content[place[0]], place[1:], weights)
        return changed
    for name, tensor in weights.items():
        changed[name] = tensor.detach().cpu().to(content[name].dtype).contiguous()
    return changed


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(value, Tensor) for value in content.values())


def _find(content: Any) -> tuple[tuple[str, ...], dict[str, Tensor]] | None:
    """Return where in a content the weights lie, and the weights."""
    place = ()
    while len(place) < 2 and isinstance(content, dict) and not _is_state_dict(content):
        key = next((key for key in WRAPPERS if key in content), None)
        if key is None:
            return None
        content, place = content[key], (*place, key)
    return (place, content) if _is_state_dict(content) else None


def _stripped(names: list[str]) -> dict[str, str]:
    """Return names by what is left of them without prefixes that all have."""
    kept = names
    if all(name == AVERAGED or str(name).startswith("module.") for name in names):
        kept = [name for name in names if name != AVERAGED]
    known = {name: name for name in kept}
    while known and (prefix := next((p for p in PREFIXES if all(str(name).startswith(p) for name in known)), None)):
        known = {name.removeprefix(prefix): original for name, original in known.items()}
    return known


def _made(layout: str, content: Any, rename: Callable[[str], str] | None = None) -> Checkpoint | None:
    """Return the checkpoint of a content that has weights; None if it has none."""
    found = _find(content)
    if found is None:
        return None
    place, weights = found
    names = _stripped(list(weights))
    if rename:
        names = {rename(name): original for name, original in names.items()}
    return Checkpoint(layout, {name: weights[original] for name, original in names.items()}, names, place, content)


def _with_keys(layout: str, *keys: str) -> Callable[[Any], Checkpoint | None]:
    """Return the reader of a layout that is known by its keys."""

    def read(content: Any) -> Checkpoint | None:
        return _made(layout, content) if isinstance(content, dict) and all(key in content for key in keys) else None

    return read


def _trojanzoo_name(name: str) -> str:
    """Return what trojanzoo's name of a ResNet's weight is here; others stay as they are."""
    name = name.replace(".downsample.", ".shortcut.").removeprefix("features.")
    return "linear" + name.removeprefix("classifier.fc") if name.startswith("classifier.fc.") else name


def _read_trojanzoo(content: Any) -> Checkpoint | None:
    plain = _made(TROJANZOO, content)
    if plain is None or "classifier.fc.weight" not in plain.state_dict:
        return None
    renamed = _made(TROJANZOO, content, _trojanzoo_name)
    return renamed if len(renamed.names) == len(plain.names) and recognise(renamed.state_dict) else None


def _read_plain(content: Any) -> Checkpoint | None:
    found = _made("wrapped", content)
    if found is None:
        return None
    as_here = not found.place and all(name == original for name, original in found.names.items())
    return Checkpoint(BARE if as_here else "wrapped", found.state_dict, found.names, found.place, found.content)


READERS: tuple[Callable[[Any], Checkpoint | None], ...] = (
    _with_keys("backdoorbench", "model_name", "num_classes", "model"),
    _with_keys("input-aware", "netC", "netG", "netM"),
    _with_keys("rnp", "state_dict", "clean_acc", "bad_acc"),
    _read_trojanzoo,
    _read_plain,
)


def read_content(content: Any, path: str | Path, translate: bool = True) -> Checkpoint:
    """Find the weights in what a checkpoint holds, whoever wrote it.

    Args:
        content: what ``load_torch`` returned.
        path: named in the error.
        translate: names into those used here; a network of the user's own has its own.

    Raises:
        InputError: there is no state_dict in it.
    """
    for read in READERS:
        if (translate or read is not _read_trojanzoo) and (found := read(content)):
            return found
    raise InputError(f"{path}: holds no state_dict; known layouts: {KNOWN}")


def read_checkpoint(path: str | Path, translate: bool = True) -> Checkpoint:
    """Read a file safely and find its weights; arguments and exceptions as of ``load_torch`` and ``read_content``."""
    return read_content(load_torch(path), path, translate)


def save_in_layout(source: dict[str, str], path: str | Path, folder: Path, state_dict: dict[str, Tensor]) -> Path:
    """Write a network once more in the layout in which it came, beside all else that its file held.

    Args:
        source: of the card of what was made of it: ``layout`` and ``sha256`` of the file.
        path: the file that it came from, which may be large and is read anew.
        folder: where to write.
        state_dict: every weight, by its name here.

    Returns:
        The new file.

    Raises:
        InputError: the file is no longer there, or another one.
        OSError: the folder cannot be written or the disk is full.
    """
    if sha256_of(path) != source["sha256"]:
        raise InputError(f"{path}: changed while the run was under way")
    checkpoint = read_checkpoint(path, translate=source["layout"] == TROJANZOO)
    target = folder / f"repaired_model.{source['layout']}.pt"
    save_torch(target, checkpoint.with_weights(state_dict))
    return target
