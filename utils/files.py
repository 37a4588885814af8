"""Files that appear whole or not at all, and files from strangers that are read without running them."""

import argparse
import hashlib
import io
import json
import os
import pickle
import re
import stat
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import InputError, quote, shorten

# All that NumPy's pickles need to rebuild plain arrays, under the module names of NumPy 1 and NumPy 2.
_NUMPY_GLOBALS = [
    (getattr(np._core.multiarray, name), f"{package}.multiarray.{name}")
    for name in ("_reconstruct", "scalar")
    for package in ("numpy.core", "numpy._core")
] + [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]


class _Options(argparse.Namespace):
    """What a file calls ``argparse.Namespace``: names and values, and never one that Python itself would call."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(isinstance(name, str) and name[:2] != "__" for name in state):
            raise TypeError("the state of an argparse.Namespace is none")
        vars(self).update(state)

    def __reduce__(self) -> tuple:
        return argparse.Namespace, (), vars(self)  # written back, it is what it was


_SAFE_GLOBALS = [*_NUMPY_GLOBALS, (_Options, "argparse.Namespace")]
_READ_ERRORS = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    MemoryError,
    OverflowError,
    SyntaxError,
    struct.error,
    zipfile.BadZipFile,
)
MEGABYTE = 1_000_000
TEXT_LIMIT = 64 * MEGABYTE  # ten times the masks of the largest network
JSON_LIMIT = MEGABYTE
INPUT_LIMIT = 16_000 * MEGABYTE  # of any file; what is larger would be hashed for minutes
WEIGHTS_ALONE = "its author can save the weights alone: torch.save(model.state_dict(), path)"


def check_file(path: str | Path, limit: int | None = None) -> None:
    """Make sure that a file can be read to its end: a pipe would wait, a device would never end.

    Args:
        path: the file.
        limit: in bytes.

    Raises:
        InputError: there is no such file, it is none, or it is larger than ``limit``.
    """
    try:
        status = Path(path).stat()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a device or a socket"
        raise InputError(f"{path}: is {kind}, expected a file")
    if limit is not None and status.st_size > limit:
        raise InputError(f"{path}: {status.st_size / MEGABYTE:.0f} MB, expected {limit // MEGABYTE} MB at most")


def card_path(checkpoint: str | Path) -> Path:
    """Return where a checkpoint's card lies: the same name, ending in .json (in .json.json where it does itself)."""
    path = Path(checkpoint)
    return path.with_suffix(".json.json" if path.suffix == ".json" else ".json")


def read_text(path: str | Path, limit: int = TEXT_LIMIT) -> str:
    """Read a UTF-8 text file; a byte order mark is dropped.

    Raises:
        InputError: it is missing, no file, larger than ``limit`` bytes, or no such text.
    """
    check_file(path, limit)
    try:
        content = Path(path).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        hint = "; save it as UTF-8" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise InputError(f"{path}: not a UTF-8 text file (byte {error.start}){hint}") from error


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: as ``read_text``, or the text is no JSON object.
    """
    text = read_text(path, limit)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({shorten(str(error))})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {quote(content)}")
    return content


def read_array(path: str | Path, shape: tuple[int, ...], highest: int = 255) -> torch.Tensor:
    """Read a ``.npy`` file of whole numbers; nothing is read before type and shape are known to be right.

    Args:
        path: the file.
        shape: as expected.
        highest: largest number allowed, 0..255; the smallest is 0.

    Shape:
        uint8 ``shape``.

    Raises:
        InputError: the file is missing, damaged or holds anything else.
    """
    check_file(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except _READ_ERRORS as error:  # its reason would recommend to unpickle
        raise InputError(f"{path}: cannot be read as a .npy file of numbers; write it with numpy.save") from error
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype.kind not in "ui":
        raise InputError(f"{path}: expected one array of whole numbers of shape {shape}")
    if array.min() < 0 or array.max() > highest:
        raise InputError(f"{path}: values from {array.min()} to {array.max()}, expected 0 to {highest}")
    return torch.from_numpy(array.astype(np.uint8))


def sha256_of(path: str | Path) -> str:
    """Return the sha256 of a file as hexadecimal digits; raises ``InputError`` where it cannot be read."""
    check_file(path, INPUT_LIMIT)
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while block := file.read(MEGABYTE):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def sha256_of_folder(folder: str | Path) -> str:
    """Return the sha256 of all files of a folder, with their places and their content; raises as ``sha256_of``."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        digest.update(os.fsencode(path.relative_to(folder)) + f" {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def write_together(contents: dict[Path, bytes]) -> None:
    """Write files so that at any moment the old or the new content of each is there, never a part.

    All are written under other names first; a full disk leaves every old file untouched. They appear in the order
    given: a reader that finds the last one finds all.

    Raises:
        OSError: a folder cannot be written or the disk is full; it names the file, and the old ones are untouched.
    """
    parts = {path: path.with_name(f".{path.name}.part") for path in contents}
    try:
        for path, part in parts.items():
            try:
                with part.open("wb") as file:
                    file.write(contents[path])
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:  # a full disk does not say which file
                raise OSError(error.errno, error.strerror, str(path)) from error
        for path, part in parts.items():
            part.replace(path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write one file whole or not at all; raises as ``write_together``."""
    write_together({Path(path): content})


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all; raises as ``write_bytes``."""
    write_bytes(path, text.encode())


def as_json(content: Any) -> bytes:
    """Return indented JSON as a file holds it."""
    return (json.dumps(content, indent=2) + "\n").encode()


def as_torch(content: Any) -> bytes:
    """Return what ``torch.save`` writes; the same content gives the same bytes whatever the file's name."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def save_torch(path: str | Path, content: Any) -> None:
    """``torch.save`` whole or not at all; raises as ``write_together``."""
    write_bytes(path, as_torch(content))


def load_torch(path: str | Path) -> Any:
    """Read a ``torch.save`` file to the CPU without running anything in it.

    Only tensors, plain containers, NumPy's numeric arrays and argparse's options are accepted.

    Raises:
        InputError: the file is missing or damaged, or asks for any other global; the message names it.
    """
    check_file(path)
    try:
        _check_archive(path)
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols; what is refused is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        found = f"it asks to run {shorten(forbidden[1])}" if forbidden else "not a plain torch.save file"
        found = _foreign(path) or found
        pictures = "; its pictures can come as a folder, --triggered-images" if "run PIL." in found else ""
        raise InputError(
            f"{path}: refused, {found}; only tensors and numeric arrays are read ({WEIGHTS_ALONE}{pictures})"
        ) from error
    except _READ_ERRORS as error:
        reason = _foreign(path) or (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: cannot be read as a torch.save file ({shorten(reason)})") from error


def _foreign(path: str | Path) -> str | None:
    """Say what else a file is that somebody takes for a checkpoint; None where that is not known."""
    with Path(path).open("rb") as file:
        start = file.read(200)
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (*_READ_ERRORS, NotImplementedError):
            return "it is a damaged zip archive"
        return None if any(name.endswith("data.pkl") for name in names) else "it is a zip archive of something else"
    signs = {
        "it is empty": not start,
        "it is a Git LFS pointer, not the file: git lfs pull": start.startswith(b"version https://git-lfs"),
        "it is a web page, not the file; download it again": start.lstrip()[:5].lower() in (b"<!doc", b"<html"),
        "it is a text file": bool(start) and start.isascii() and start.decode().replace("\n", "").isprintable(),
        "it is a safetensors file": start[8:9] == b"{" and b'"dtype"' in start,
    }
    return next((what for what, found in signs.items() if found), None)


def _check_archive(path: str | Path) -> None:
    """Refuse a zip archive that is damaged, would grow when it is unpacked, or holds a program.

    torch.load itself checks no checksum, and unpacks whatever it finds.
    """
    if not zipfile.is_zipfile(path):
        return  # the older format, which has no checksums
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.filename.partition("/")[2] == "constants.pkl" for entry in entries):
            raise InputError(f"{path}: a TorchScript program, and programs are never run here; {WEIGHTS_ALONE}")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise InputError(f"{path}: a compressed archive; torch.save writes uncompressed ones")
        damaged = archive.testzip()
    if damaged:
        raise InputError(f"{path}: damaged, {quote(damaged)} does not match its checksum; fetch the file again")
