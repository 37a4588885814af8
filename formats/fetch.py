"""Files from elsewhere: web addresses, DOIs, Google Drive, Hugging Face. What arrives is checked before it is kept."""

import errno
import importlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import filelock
import pooch
from tqdm import tqdm

from utils.console import announce
from utils.errors import InputError, shorten
from utils.files import INPUT_LIMIT, MEGABYTE, as_json, check_file, read_json, sha256_of, write_bytes

TIMEOUT = 30  # seconds without a byte
PAGE_STARTS = (b"<!doc", b"<html", b"<?xml")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)  # of the disk, not of the network
FIRST_SEEN = "first_seen.json"  # in the cache: sha256 of files whose publisher names none


@dataclass(frozen=True)
class Wanted:
    """A file that is somewhere else.

    Attributes:
        target: where it shall lie.
        sources: addresses, tried in order: ``https://``, ``http://``, ``doi:``, ``drive:ID``, ``hf:owner/repo/file``.
        sha256: as its publisher names it; None where he does not.
        size: in bytes; None where it is not known.
    """

    target: Path
    sources: tuple[str, ...]
    sha256: str | None = None
    size: int | None = None


def fetch(wanted: Wanted, cache: Path) -> Path:
    """Return where the file lies; fetch it first if it is not there. What was put there by hand is taken, too.

    Args:
        wanted: the file.
        cache: folder that remembers the sha256 of files whose publisher names none.

    Raises:
        InputError: no source gave the file, or its bytes are not those that were published, or seen before.
        OSError: the folder cannot be written, or the disk is full.
    """
    wanted.target.parent.mkdir(parents=True, exist_ok=True)
    cache.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(cache / ".lock"):  # another run may be fetching the same file
        if os.path.lexists(wanted.target):
            try:
                _check(wanted.target, wanted, str(wanted.target))
            except InputError as error:
                raise InputError(f"{error}; remove it, and it is fetched again") from error
        else:
            _fetch_anew(wanted)
        if wanted.sha256 is None:
            _compare_with_first(wanted, cache)
    return wanted.target


def fetch_latest(source: str, target: Path, limit: int) -> Path:
    """Fetch a file that its publisher may change; where that fails, the copy of the last time is taken.

    Args:
        source: its address.
        target: where it shall lie.
        limit: in bytes.

    Raises:
        InputError: it cannot be fetched, and was not before.
        OSError: as ``fetch``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(target.with_name(".lock")):
            _fetch_anew(Wanted(target, (source,)), limit)
    except InputError as error:
        if not target.is_file():
            raise
        announce(f"{error}; taking the copy that was fetched before")
    return target


def fetch_folder(identity: str, target: Path, cache: Path) -> list[Path]:
    """Fetch a public folder of Google Drive; files that are there already are kept.

    Args:
        identity: of the folder.
        target: where its files shall lie.
        cache: as for ``fetch``.

    Returns:
        All files that lie there then.

    Raises:
        InputError: the folder cannot be fetched, or a file is another one than the first time.
        OSError: as ``fetch``.
    """
    target.mkdir(parents=True, exist_ok=True)
    gdown = _optional("gdown")
    with filelock.FileLock(cache / ".lock"):
        advice = f"; put its files by hand into {target.absolute()}"
        with _network_errors(f"cannot fetch the folder {identity} of Google Drive", advice):
            gdown.download_folder(id=identity, output=str(target), resume=True, timeout=TIMEOUT)
        return [_seen(path, cache) for path in sorted(target.rglob("*")) if path.is_file()]


def _seen(path: Path, cache: Path) -> Path:
    """Check a file whose sha256 nobody names, and return its path; raises ``InputError`` as ``fetch``."""
    wanted = Wanted(path, ())
    _check(path, wanted, str(path))
    _compare_with_first(wanted, cache)
    return path


@contextmanager
def _network_errors(what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a library for the network raises into one line.

    Raises:
        InputError: the block failed.
        OSError: it failed as the disk is full, or cannot be written.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # such libraries raise whatever they like
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        reason = shorten(" ".join(str(error).split()) or type(error).__name__)
        raise InputError(f"{what}: {reason}{advice}") from error


def _fetch_anew(wanted: Wanted, limit: int = INPUT_LIMIT) -> None:
    part, reasons = wanted.target.with_name(f".{wanted.target.name}.part"), []
    for source in wanted.sources:
        try:
            _download(source, part, min(limit, wanted.size or limit))
            _check(part, wanted, source)
            part.replace(wanted.target)
        except InputError as error:
            reasons.append(str(error))
            continue
        finally:
            part.unlink(missing_ok=True)
        announce(f"fetched {source} ({wanted.target.stat().st_size / MEGABYTE:.1f} MB) to {wanted.target}")
        return
    why = "; ".join(reasons) or "no address is known"
    raise InputError(f"cannot fetch {wanted.target.name}: {why}; put it by hand at {wanted.target.absolute()}")


class _Limited:
    """A file that refuses to grow beyond what was announced: a server may send for ever."""

    def __init__(self, path: Path, limit: int):
        self.file, self.left = path.open("wb"), limit

    def write(self, chunk: bytes) -> None:
        self.left -= len(chunk)
        if self.left < 0:
            raise ValueError("the server sends more bytes than the file should have")
        self.file.write(chunk)

    def flush(self) -> None:
        self.file.flush()


def _download(source: str, part: Path, limit: int) -> None:
    """Write what a source gives to a file.

    Raises:
        InputError: it gives nothing, or more than ``limit`` bytes.
        OSError: the file cannot be written.
    """
    scheme, _, rest = source.partition(":")
    ways = {"http": _from_web, "https": _from_web, "doi": _from_web, "drive": _from_drive, "hf": _from_hub}
    if scheme not in ways:
        raise InputError(f"{source}: not an address of a known kind ({', '.join(ways)})")
    with _network_errors(source):
        ways[scheme](source if ways[scheme] is _from_web else rest, part, limit)


def _from_web(source: str, part: Path, limit: int) -> None:
    bar = tqdm(total=1, desc="fetching", unit="B", unit_scale=True, leave=False, disable=None)  # pooch sets the total
    kind = pooch.DOIDownloader if source.startswith("doi:") else pooch.HTTPDownloader
    downloader = kind(progressbar=bar, timeout=TIMEOUT)
    target = _Limited(part, limit)
    try:
        downloader(source, target, None)
    finally:
        target.file.close()
        bar.close()


def _from_drive(identity: str, part: Path, limit: int) -> None:
    gdown = _optional("gdown")
    if gdown.download(id=identity, output=str(part), resume=True, timeout=TIMEOUT) is None:
        raise InputError(f"drive:{identity}: Google Drive gave no file")


def _from_hub(place: str, part: Path, limit: int) -> None:
    owner, _, rest = place.partition("/")
    repository, _, name = rest.partition("/")
    if not name or ".." in rest.split("/"):  # older versions of the library would leave the folder
        raise InputError(f"hf:{place}: expected hf:owner/repository/file")
    hub = _optional("huggingface_hub")
    with tempfile.TemporaryDirectory(dir=part.parent) as folder:
        Path(hub.hf_hub_download(f"{owner}/{repository}", name, local_dir=folder)).replace(part)


def _optional(name: str) -> ModuleType:
    """Import a library that only some sources need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"this address needs the package {name}: pip install {name}") from error


def _check(path: Path, wanted: Wanted, source: str) -> None:
    """Make sure that a file is what was announced, and no page that says why there is none.

    Raises:
        InputError: it is not.
    """
    check_file(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(200).lstrip().lower()
    if start.startswith(PAGE_STARTS):
        raise InputError(f"{source}: is a web page, not the file (a quota, a login or a warning)")
    if wanted.size is not None and size != wanted.size:
        raise InputError(f"{source}: {size} bytes, expected {wanted.size}")
    if not size:
        raise InputError(f"{source}: is empty")
    found = sha256_of(path)
    if wanted.sha256 is not None and found != wanted.sha256:
        raise InputError(f"{source}: its sha256 is {found}, expected {wanted.sha256}")


def _compare_with_first(wanted: Wanted, cache: Path) -> None:
    """Record the sha256 of a file whose publisher names none, and compare from then on.

    Raises:
        InputError: the file is another one than the first time.
    """
    name, found = str(wanted.target.relative_to(cache)), sha256_of(wanted.target)
    seen = read_json(cache / FIRST_SEEN) if (cache / FIRST_SEEN).exists() else {}
    if name not in seen:
        write_bytes(cache / FIRST_SEEN, as_json({**seen, name: {"sha256": found, "sources": wanted.sources}}))
        announce(
            f"{wanted.target}: its publisher names no sha256, so this one is recorded and compared from now on: {found}"
        )
        return
    expected = seen[name].get("sha256") if isinstance(seen[name], dict) else None
    if found != expected:
        raise InputError(
            f"{wanted.target}: its sha256 is {found}, but was {expected} when it was first seen; remove the file to "
            f"fetch it again, or its entry in {cache / FIRST_SEEN} if it was replaced on purpose"
        )
