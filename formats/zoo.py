"""The zoo: networks by name, from this repository or from elsewhere, and what is known of them.

An index is a JSON file. Paths in it are relative to the index itself, so that a folder with an index can lie anywhere:
in the repository, on a disk, on a web server.
"""

import argparse
import difflib
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urljoin

from formats.cards import CARD_VERSION, wrong_entry
from formats.fetch import Wanted, fetch, fetch_folder, fetch_latest
from utils.config import Config, InputFile, given_flags, setting
from utils.errors import InputError, quote
from utils.files import JSON_LIMIT, as_json, card_path, read_json, sha256_of, write_bytes

INDEX_VERSION = 1
INDEX = Path(__file__).parents[1] / "zoo" / "index.json"
PARTS = {"checkpoint": "network", "clb_surrogate": "network", "trigger_info": "trigger", "mask_file": "masks"}
FIGURES = ("measured", "published")  # by this project, or by the authors of the network
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ADDRESS = re.compile(r"(https?://|doi:|drive:|hf:)\S+")


@dataclass(frozen=True)
class ZooConfig(Config):
    """Where networks come from that are named, not pointed at."""

    zoo_index: str | None = setting(
        None,
        "index.json of another zoo, a path or an address (default: the networks of this repository)",
        metavar="INDEX",
    )
    cache_dir: str | None = setting(
        None, "folder for what is fetched (default: $ANP_CACHE_DIR, else ~/.cache/anp)", metavar="DIR"
    )

    @property
    def cache(self) -> Path:
        """The folder for what is fetched."""
        return Path(self.cache_dir or os.environ.get("ANP_CACHE_DIR") or Path.home() / ".cache" / "anp").absolute()


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    Attributes:
        name: under which it is asked for.
        files: by part (``network``, ``trigger``, ``masks``): ``file``, ``sha256``, ``bytes``, ``mirrors``.
        card: as beside a checkpoint, without version and sha256.
        figures: who measured what the card says: ``measured`` here, or ``published``.
        licence, source: of the network.
    """

    name: str
    files: dict[str, dict[str, Any]]
    card: dict[str, Any]
    figures: str
    licence: str
    source: str


@dataclass(frozen=True)
class Folder:
    """A folder of networks that somebody else published, without an index; ``NAME/FILE`` is a file in it.

    Attributes:
        name: of the folder.
        drive: its id on Google Drive.
        about, licence: what is in it, and on which terms.
    """

    name: str
    drive: str
    about: str
    licence: str


@dataclass(frozen=True)
class Zoo:
    """An index and where it lies.

    Attributes:
        base: folder or address to which the paths in it are relative.
        cache: folder for files that are not beside the index.
        entries: networks by name.
        folders: of others, by name.
    """

    base: str
    cache: Path
    entries: dict[str, Entry]
    folders: dict[str, Folder]

    def find(self, name: str) -> Entry:
        """Return an entry.

        Raises:
            InputError: there is none of this name.
        """
        if name not in self.entries:
            close = difflib.get_close_matches(name, self.entries, 1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(self.entries)}"
            raise InputError(f"no network {quote(name)} in the zoo; {hint}")
        return self.entries[name]

    def file(self, entry: Entry, part: str) -> Path:
        """Return where a file of an entry lies, fetched if need be and compared with the index.

        Raises:
            InputError: the entry has no such file, it cannot be fetched, or it is another one.
        """
        if part not in entry.files:
            raise InputError(f"{entry.name}: the zoo has no {part} of it, only {' and '.join(entry.files)}")
        known = entry.files[part]
        there = None if is_address(self.base) else Path(self.base, known["file"])
        if there and there.is_file():
            found = sha256_of(there)
            if found != known["sha256"]:
                raise InputError(f"{there}: its sha256 is {found}, but the zoo's index says {known['sha256']}")
            return there
        beside = _beside(self.base, known["file"]) if is_address(self.base) else ()
        target = self.cache / f"zoo-{_short_digest(self.base)}" / known["file"]
        path = fetch(Wanted(target, (*beside, *known["mirrors"]), known["sha256"], known["bytes"]), self.cache)
        if part in ("network", "trigger"):  # a trigger may be generators, which need to know what they were trained for
            described = entry.card if part == "network" else {"trained_with": entry.card}
            card = {"card_version": CARD_VERSION, "sha256": known["sha256"], **described}
            write_bytes(card_path(path), as_json(card))
        return path

    def fetch_folder(self, folder: Folder) -> list[Path]:
        """Return the files of a folder, fetched if need be; raises as ``formats.fetch.fetch_folder``."""
        return fetch_folder(folder.drive, self.place_of(folder), self.cache)

    def place_of(self, folder: Folder) -> Path:
        """Return where the files of a folder lie, or are to be put by hand; another index may use its name."""
        return self.cache / f"drive-{folder.drive}"

    def file_of_folder(self, given: str) -> Path:
        """Return a file of a folder that was fetched, or put there by hand.

        Args:
            given: ``NAME/FILE``.

        Raises:
            InputError: it is not there, or another one than the first time.
        """
        name, _, file = given.partition("/")
        place = self.place_of(self.folders[name])
        path = place / file
        if path.is_file() and place.resolve() in path.resolve().parents:
            return fetch(Wanted(path, ()), self.cache)
        files = sorted(f"{name}/{each.relative_to(place)}" for each in place.rglob("*.th"))
        there = f"there are {', '.join(files[:8])}" if files else f"python model_zoo.py fetch {name} fetches it"
        raise InputError(f"{given}: not in {place}; {there}")


def is_address(place: str) -> bool:
    """Say whether a text is the address of a file, not a path or a name."""
    return bool(_ADDRESS.fullmatch(place))


def _beside(base: str, file: str) -> tuple[str, ...]:
    """Return the address of a file beside an index; none on Google Drive, whose addresses name no folder."""
    if base.startswith("http"):
        return (urljoin(base, file),)
    return () if base.startswith("drive:") else (f"{base.rpartition('/')[0]}/{file}",)


def check_name(name: str) -> None:
    """Raise ``InputError`` where an index would not take this name of a network."""
    if not _NAME.fullmatch(name):
        raise InputError(f"{quote(name)}: a name has letters, digits, dots and dashes")


def folder_of(config: ZooConfig) -> Path:
    """Return the folder of an index that can be written; raises ``InputError`` where it lies at an address."""
    if is_address(place := config.zoo_index or str(INDEX)):
        raise InputError(f"--zoo-index {place}: cannot be written; name a folder")
    return Path(place).parent if Path(place).suffix == INDEX.suffix else Path(place)


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def open_zoo(config: ZooConfig) -> Zoo:
    """Read an index, anew if it is an address.

    Raises:
        InputError: it is missing or no index.
    """
    place = config.zoo_index or str(INDEX)
    if is_address(place):
        path = config.cache / f"zoo-{_short_digest(place)}" / INDEX.name
        return Zoo(place, config.cache, *_read_index(fetch_latest(place, path, JSON_LIMIT)))
    path = Path(place, INDEX.name) if Path(place).is_dir() else Path(place)
    return Zoo(str(path.parent), config.cache, *_read_index(path))


def _read_index(path: Path) -> tuple[dict[str, Entry], dict[str, Folder]]:
    content = read_json(path)
    if content.get("index_version") != INDEX_VERSION or not isinstance(content.get("networks"), dict):
        raise InputError(f"{path}: not an index of version {INDEX_VERSION}: it needs index_version and networks")
    entries = {}
    for name, known in content["networks"].items():
        fault = _fault_of(name, known)
        if fault:
            raise InputError(f"{path}: the entry {quote(name)} is wrong: {fault}")
        entries[name] = Entry(name, **known)
    return entries, _read_folders(path, content.get("folders", {}))


def _read_folders(path: Path, content: Any) -> dict[str, Folder]:
    folders = {}
    for name, known in content.items() if isinstance(content, dict) else [("", None)]:
        is_right = isinstance(known, dict) and known.keys() == {"drive", "about", "licence"}
        is_right = is_right and all(isinstance(value, str) for value in known.values())
        if not is_right or not _NAME.fullmatch(name) or not re.fullmatch(r"[\w-]+", known["drive"], re.ASCII):
            raise InputError(f"{path}: the folder {quote(name)} is wrong: it needs drive, about and licence")
        folders[name] = Folder(name, **known)
    return folders


def _fault_of(name: str, known: Any) -> str | None:
    """Say what is wrong with an entry, which may come from anywhere; None if nothing is."""
    if not _NAME.fullmatch(name):
        return "a name has letters, digits, dots and dashes"
    wanted = {"files": dict, "card": dict, "figures": str, "licence": str, "source": str}
    if not isinstance(known, dict) or known.keys() != wanted.keys():
        return f"it needs {', '.join(wanted)}"
    for key, kind in wanted.items():
        if not isinstance(known[key], kind):
            return f"{key} is {quote(known[key])}"
    if known["figures"] not in FIGURES:
        return f"figures is {quote(known['figures'])}, expected {' or '.join(FIGURES)}"
    if "network" not in known["files"]:
        return "it has no network among its files"
    faults = [_fault_of_file(part, file) for part, file in known["files"].items()]
    return next(filter(None, faults), wrong_entry(known["card"]))


def _fault_of_file(part: str, file: Any) -> str | None:
    if part not in PARTS.values():
        return f"it has a file for {quote(part)}"
    if not isinstance(file, dict) or file.keys() != {"file", "sha256", "bytes", "mirrors"}:
        return f"{part} needs file, sha256, bytes and mirrors"
    place = PurePosixPath(file["file"]) if isinstance(file["file"], str) else None
    if place is None or place.is_absolute() or not all(_NAME.fullmatch(step) for step in place.parts) or not place.name:
        return f"{part} lies at {quote(file['file'])}, expected a path below the index"
    if not isinstance(file["sha256"], str) or not re.fullmatch("[0-9a-f]{64}", file["sha256"]):
        return f"{part} has sha256 {quote(file['sha256'])}"
    if type(file["bytes"]) is not int or file["bytes"] < 1:
        return f"{part} has {quote(file['bytes'])} bytes"
    mirrors = file["mirrors"]
    if not isinstance(mirrors, list) or not all(isinstance(each, str) and is_address(each) for each in mirrors):
        return f"{part} has mirrors {quote(mirrors)}"
    return None


def locate(given: str, part: str, config: ZooConfig) -> Path:
    """Return the file that a path, an address, or a name from the zoo stands for; fetch it if need be.

    Args:
        given: what the user said.
        part: ``network``, ``trigger`` or ``masks``; which file a name stands for.
        config: the zoo.

    Raises:
        InputError: there is no such file or name, or it cannot be fetched.
    """
    if os.path.lexists(given):
        return Path(given)
    if is_address(given):
        name = re.split(r"[/:]", given.partition("?")[0])[-1]
        name = name if _NAME.fullmatch(name) else "file"
        target = config.cache / "addresses" / _short_digest(given) / name
        return fetch(Wanted(target, (given,)), config.cache)
    first = given.partition("/")[0]
    if not _NAME.fullmatch(first):
        return Path(given)  # whoever reads it says what is wrong
    zoo = open_zoo(config)
    if first in zoo.folders and first != given:
        return zoo.file_of_folder(given)
    if first != given:
        return Path(given)
    if given not in zoo.entries and Path(given).suffix:
        return Path(given)
    return zoo.file(zoo.find(given), part)


def locate_inputs(args: argparse.Namespace) -> None:
    """Replace names and addresses on a command line by the files that they stand for; raises as ``locate``."""
    config = ZooConfig(**given_flags(args, ZooConfig))
    for flag, part in PARTS.items():
        given = getattr(args, flag, None)
        if given:
            setattr(args, flag, InputFile(locate(given, part, config)))


def write_index(place: Path, entries: Iterable[Entry], folders: Iterable[Folder] = ()) -> None:
    """Write the index of a zoo that lies in a folder; raises ``OSError`` where it cannot be written."""
    named = [
        {each.name: {k: v for k, v in asdict(each).items() if k != "name"} for each in group}
        for group in (entries, folders)
    ]
    content = {"index_version": INDEX_VERSION, "networks": named[0], "folders": named[1]}
    write_bytes(place / INDEX.name, as_json(content))
