"""Which run a run is: the options and files that decide its result, compared when it is to be continued."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from utils.config import InputCode, InputFile, InputFolder
from utils.errors import quote
from utils.files import sha256_of, sha256_of_folder

# What may differ between a run and its continuation: it changes no result, or, like the device, stands in the facts.
FREE_OPTIONS = {"resume", "overwrite", "output_dir", "data_dir", "save_every", "print_every", "export_poisoned"}
FREE_OPTIONS |= {"zoo_index", "cache_dir"}  # a named network counts by its content
FACT_OPTIONS = {"device", "precision", "threads"}
CARD_OPTIONS = {
    "arch",
    "widen_factor",
    "dataset",
    "image_size",
    "mean",
    "std",
}  # a card may say them too; what came of it is a fact


def input_files(arguments: Namespace) -> dict[str, Path]:
    """Return the files that a command line names, by flag."""
    return {name: value.path for name, value in vars(arguments).items() if isinstance(value, InputFile)}


def input_folders(arguments: Namespace) -> dict[str, Path]:
    """Return the folders that a command line names as input, by flag."""
    return {name: Path(value) for name, value in vars(arguments).items() if isinstance(value, InputFolder)}


def options_of(arguments: Namespace) -> dict[str, Any]:
    """Return the options of a command line in plain types, without those that change no result."""
    return {name: _plain(value) for name, value in sorted(vars(arguments).items()) if name not in FREE_OPTIONS}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, str) else value


def digests_of(arguments: Namespace) -> dict[str, str]:
    """Return the sha256 of every input that is there, by flag; raises ``InputError`` where one cannot be read."""
    files = {name: sha256_of(path) for name, path in input_files(arguments).items() if path.exists()}
    codes = {name: value for name, value in vars(arguments).items() if isinstance(value, InputCode)}
    files |= {name: f"{files[name]} {value.function}" for name, value in codes.items() if name in files}
    return files | {name: sha256_of_folder(path) for name, path in input_folders(arguments).items() if path.is_dir()}


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Say how two runs differ; None where nothing differs that decides the result.

    Args:
        before, now: what ``options_of`` returned, with what ``digests_of`` returned as ``sha256``: files count by
            their content, not by their names.

    Raises:
        TypeError: these are no options.
        KeyError: there are no digests.
    """
    files = dict(before["sha256"]), dict(now["sha256"])
    for name in sorted(files[0].keys() | files[1].keys()):
        old, new = files[0].get(name), files[1].get(name)
        if old != new:
            what = "another file than" if old and new else "given, unlike" if new else "not given, unlike"
            return f"{_flag(name)} is {what} before"
    compared = (before.keys() | now.keys()) - {"sha256"} - FACT_OPTIONS - files[0].keys() - files[1].keys()
    for name in sorted(compared, key=lambda name: (not (name in before and name in now), name)):  # first what both have
        old, new = before.get(name), now.get(name)
        if old != new and not (name in CARD_OPTIONS and None in (old, new)):
            return f"{_flag(name)} is {_said(new)} but was {_said(old)} before"
    return None


def _flag(name: str) -> str:
    return "--" + str(name).replace("_", "-")


def _said(value: Any) -> str:
    return "not given" if value is None else value if isinstance(value, str) else quote(value)
