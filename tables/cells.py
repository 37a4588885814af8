"""A cell of a table: one command of the project with an output folder of its own.

The folder is named after the command, without places of files, and after what it depends on. Two tables that need the
same cell share it, and a changed setting leads to another folder.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks import ATTACKS
from data.datasets import FOLDER
from defenses import DEFENSES
from formats.zoo import PARTS, Zoo, is_address
from tables.table_file import Flags
from utils.config import InputCode, flag_fields
from utils.errors import InputError
from utils.files import card_path, sha256_of, sha256_of_folder
from utils.identity import FREE_OPTIONS, input_files, input_folders

ROOT = Path(__file__).parents[1]
CELLS = Path("save", "tables", "cells")
DONE = "done"  # the empty file that a cell leaves when it has ended well
LOG = "log.txt"
RESULTS = {"prune": "repaired_model.json", "defend": "repaired_model.json", "evaluate": "metrics.json"}
SCRIPTS = {
    "train": "train_backdoor_cifar",
    "masks": "optimize_mask_cifar",
    "prune": "prune_neuron_cifar",
    "defend": "defend_cifar",
    "evaluate": "evaluate_cifar",
}
SLUG = 90  # characters of a folder's name before the digest
ALWAYS = {"--poison-type", "--seed"}  # in a folder's name even where it is the default


@dataclass(frozen=True)
class Cell:
    """One command.

    Attributes:
        name: of its folder.
        kind: of the command, see ``SCRIPTS``.
        command: its words.
        needs: names of the cells that have to be done before.
    """

    name: str
    kind: str
    command: list[str]
    needs: list[str]


@functools.cache
def taken(kind: str, method: str) -> set[str]:
    """Return the flags that a kind's script takes for an attack or a defence; of others the method says nothing."""
    choices = {
        "train": {name: (attack, attack.train_config) for name, attack in ATTACKS.items()},
        "defend": {name: (defense,) for name, defense in DEFENSES.items()},
    }.get(kind, {})
    owned = {name: {dest for config in configs for dest in flag_fields(config)} for name, configs in choices.items()}
    foreign = set().union(*owned.values()) - owned.get(method, set())
    known = importlib.import_module(SCRIPTS[kind]).build_parser()._option_string_actions
    return {flag for flag in known if _option(flag) not in foreign}


def _option(flag: str) -> str:
    """Return the name under which argparse stores a flag."""
    return flag[2:].replace("-", "_")


def parse(kind: str, words: list[str]) -> argparse.Namespace:
    """Parse a command as its script does.

    Raises:
        InputError: the script would refuse it; the message is the script's.
    """
    script, complaint = importlib.import_module(SCRIPTS[kind]), io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed = getattr(script, "parse_arguments", script.build_parser().parse_args)(words)
    except SystemExit as error:
        message = complaint.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise InputError(f"{SCRIPTS[kind]}.py: {message}") from error
    return parsed[0] if isinstance(parsed, tuple) else parsed


def _words(flags: Flags) -> list[str]:
    return [word for flag, values in flags.items() for word in (flag, *values)]


def make_cell(
    kind: str, subject: str, inputs: Flags, flags: Flags, needs: list[str], folder: Path, zoo: Zoo
) -> tuple[Cell, argparse.Namespace]:
    """Make a cell, and parse its command.

    Args:
        kind: of the command.
        subject: how folders call the network.
        inputs: the flags that are no settings of a table, such as ``--checkpoint``.
        flags: the settings.
        needs: names of the cells that have to be done before.
        folder: of all cells.
        zoo: knows the content of networks by name.

    Raises:
        InputError: the script would refuse the command, or an input is not there or cannot be read.
    """
    output = ["--json", RESULTS[kind]] if kind == "evaluate" else ["--output-dir", kind]

    def parsed(some: Flags) -> argparse.Namespace:
        return parse(kind, [*output, *_words({**inputs, **some, "--threads": ("1",)})])

    args = parsed(flags)
    _check_images(flags)
    settings = {flag: flags[flag] for flag in flags if flag in ALWAYS or _matters(flag, flags, args, parsed)}
    identity = _identity({**inputs, **settings}, args, folder, zoo)
    digest = hashlib.sha256(json.dumps([kind, sorted(identity.items())], default=str).encode()).hexdigest()[:10]
    name = f"{_slug(kind, subject, inputs, list(settings), args)}-{digest}"
    output = ["--json", str(folder / name / output[1])] if kind == "evaluate" else ["--output-dir", str(folder / name)]
    resume = [] if kind == "evaluate" else ["--resume"]
    words = _words({**inputs, **flags, "--threads": ("1",)})
    return Cell(name, kind, ["python", f"{SCRIPTS[kind]}.py", *output, *words, *resume], needs), args


def _matters(flag: str, flags: Flags, args: argparse.Namespace, parsed: Callable[[Flags], argparse.Namespace]) -> bool:
    """Say whether a command would be another one without a flag: it changes the result, and is not the default."""
    if _option(flag) in FREE_OPTIONS:
        return False
    try:
        return parsed({other: flags[other] for other in flags if other != flag}) != args
    except InputError:
        return True  # it has to be given


def _check_images(flags: Flags) -> None:
    """Raise ``InputError`` where the folder of the images is not there."""
    for flag, begin in (("--data-dir", ""), ("--dataset", FOLDER)):
        for value in flags.get(flag, ()):
            if value.startswith(begin) and not Path(value.removeprefix(begin)).is_dir():
                raise InputError(f"{flag} {value}: there is no such folder; make it first")


def _identity(flags: Flags, args: argparse.Namespace, folder: Path, zoo: Zoo) -> dict[str, Any]:
    """Return what tells a cell from others: its settings, and the content of its inputs."""
    files, folders = input_files(args), input_folders(args)
    identity = {}
    for flag, values in flags.items():
        option = _option(flag)
        value = getattr(args, option)
        identity[option] = value
        if option in files:
            identity[option] = _content(flag, values[0], files[option], folder, zoo)
        if option in folders:
            identity[option] = _content_of_folder(flag, folders[option])
        if isinstance(value, InputCode):
            identity[option] += value.function
    return identity


def _content(flag: str, given: str, path: Path, folder: Path, zoo: Zoo) -> str:
    """Return what stands for an input: its place in the cell that makes it, or else the digest of its content.

    What lies at an address, or in a folder that others published, stands for itself: it is fetched when it is needed.

    Raises:
        InputError: it is nowhere.
    """
    if path.is_relative_to(folder):
        return str(path.relative_to(folder))
    if os.path.lexists(path):
        card = card_path(path)
        return sha256_of(path) + (sha256_of(card) if card.is_file() else "")
    part, entry = PARTS.get(_option(flag)), zoo.entries.get(given)
    if entry and part in entry.files:
        return entry.files[part]["sha256"]
    name, _, file = given.partition("/")
    if part and (is_address(given) or (file and name in zoo.folders)):
        return given
    others = f", no address, and the zoo has no such {part}" if part else ""
    raise InputError(f"{flag} {given}: no such file{others}")


def _content_of_folder(flag: str, path: Path) -> str:
    if not path.is_dir():
        raise InputError(f"{flag} {path}: no such folder")
    return sha256_of_folder(path)


def _slug(kind: str, subject: str, inputs: Flags, settings: list[str], args: argparse.Namespace) -> str:
    """Return a name that tells a reader what a cell is about; files are left out."""
    words = [kind, subject, *inputs.get("--defense", ()), getattr(args, "poison_type", "")]
    for flag in settings:
        value = getattr(args, _option(flag))
        if _option(flag) not in {*PARTS, "poison_type", "split_file"}:
            words.append(flag[2:] if value is True else f"{flag[2:]}={value}")
    text = re.sub(r"[^\w.=-]+", "_", "-".join(filter(None, words)))
    return text[:SLUG].rstrip("-._")
