"""Files that appear whole or not at all, and files from strangers that are read without running them."""

import hashlib
import io
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import InputError

# All that NumPy's pickles need to rebuild plain arrays, under the module names of NumPy 1 and NumPy 2.
_NUMPY_GLOBALS = [
    (getattr(np._core.multiarray, name), f"{package}.multiarray.{name}")
    for name in ("_reconstruct", "scalar")
    for package in ("numpy.core", "numpy._core")
] + [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}]


def sha256_of(path: str | Path) -> str:
    """Return the sha256 of a file as hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def sha256_of_folder(folder: str | Path) -> str:
    """Return the sha256 that names all files of a folder, with their places and their content."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        digest.update(os.fsencode(path.relative_to(folder)) + f" {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def write_together(contents: dict[Path, bytes]) -> None:
    """Write files so that at any moment the old or the new content of each is there, never a part.

    All are written under other names first; a full disk leaves every old file untouched. They appear in the order
    given: a reader that finds the last one finds all.

    Raises:
        OSError: a folder cannot be written or the disk is full; the old files are then untouched.
    """
    parts = {path: path.with_name(f".{path.name}.part") for path in contents}
    try:
        for path, part in parts.items():
            with part.open("wb") as file:
                file.write(contents[path])
                file.flush()
                os.fsync(file.fileno())
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

    Only tensors, plain containers and NumPy's numeric arrays are accepted.

    Raises:
        InputError: the file is missing or damaged, or asks for any other global; the message names it.
    """
    try:
        with torch.serialization.safe_globals(_NUMPY_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols; what is refused is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            message = f"{path}: refused, it asks to run {forbidden[1]}; only tensors and numeric arrays are read"
        else:
            message = f"{path}: refused, not a plain torch.save file of tensors and numeric arrays"
        raise InputError(message) from error
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        AssertionError,
        LookupError,
        MemoryError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: cannot be read as a torch.save file ({reason[:200]})") from error
