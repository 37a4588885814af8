"""Pictures from files that strangers made: damaged ones, and small files of huge pictures, end in one line."""

import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from utils.errors import InputError, shorten
from utils.files import check_file
from utils.machine import check_memory

FORMATS = ("PNG", "BMP", "PPM", "JPEG")  # others would reach programs such as Ghostscript
SUFFIXES = (".png", ".bmp", ".ppm", ".pgm", ".jpg", ".jpeg")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # at most 8 bits a channel; others would be cut off
BAR_DELAY = 2.0  # seconds after which a progress bar is worth showing
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    EOFError,
    OverflowError,
    AssertionError,
    struct.error,
    zlib.error,
    Warning,
    Image.DecompressionBombError,
)
Size = tuple[int, int]  # width and height, in pixels
Resize = Callable[[Image.Image, Size], Image.Image]


@contextmanager
def open_picture(path: Path) -> Iterator[Image.Image]:
    """Lend a picture of which only the header has been read.

    Raises:
        InputError: there is no such file, it is no picture, huge, or the block finds that it is damaged.
    """
    check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(path, formats=FORMATS) as picture:
                yield picture
    except InputError:
        raise  # it says more
    except _DAMAGED as error:
        raise InputError(f"{path}: not a readable picture ({shorten(str(error))})") from error


def read_size(path: Path) -> Size:
    """Return width and height of a picture; raises as ``open_picture``."""
    with open_picture(path) as picture:
        return picture.size


def read_rgb(path: Path, size: Size, hint: str, resize: Resize | None = None) -> Tensor:
    """Read a picture as RGB; grey and palettes are converted, transparency is dropped.

    Args:
        path: its file.
        size: width and height, in pixels.
        hint: what to say where it has another size, which is then not even decoded.
        resize: brings it to this size; None where it has to have it.

    Shape:
        uint8 (H, W, 3), 0..255.

    Raises:
        InputError: as ``open_picture``, or it has another size or more than 8 bits a channel.
    """
    with open_picture(path) as picture:
        if resize is None and picture.size != size:
            raise InputError(f"{path}: {picture.width}x{picture.height} pixels, {hint}")
        if picture.mode not in MODES:
            raise InputError(f"{path}: pixels of the kind {picture.mode}; convert the picture to 8 bits a channel")
        picture.load()
        picture.info.pop("transparency", None)  # of a palette, it would be applied with a warning
        rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
        return torch.from_numpy(np.array(rgb if resize is None else resize(rgb, size)))


def squash(picture: Image.Image, size: Size) -> Image.Image:
    """Resize whatever the proportions, bilinear with antialiasing."""
    return picture.resize(size, Image.Resampling.BILINEAR)


def crop_to_fit(picture: Image.Image, size: Size) -> Image.Image:
    """Cut the middle out of a picture, in the proportions of ``size``, and resize it as ``squash`` does."""
    return ImageOps.fit(picture, size, Image.Resampling.BILINEAR)


def read_pictures(paths: Sequence[Path], size: Size, hint: str = "", resize: Resize | None = None) -> Tensor:
    """Read pictures, with a progress bar on a terminal.

    Args:
        paths, size, hint, resize: as for ``read_rgb``.

    Shape:
        uint8 (N, H, W, 3), 0..255.

    Raises:
        InputError: as ``read_rgb``; before any picture is decoded, where all would not fit into the free memory.
    """
    width, height = size
    what = f"{len(paths)} pictures of {width}x{height} pixels, the first of them {paths[0]},"
    check_memory(len(paths) * height * width * 3, what, "take fewer or smaller ones", torch.device("cpu"))
    images = torch.empty(len(paths), height, width, 3, dtype=torch.uint8)
    for number, path in enumerate(
        tqdm(paths, "reading", leave=False, disable=None, delay=BAR_DELAY, unit="image", dynamic_ncols=True)
    ):
        images[number] = read_rgb(path, size, hint, resize)
    return images


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the folders in a folder and of all else in it, sorted; hidden ones are left out.

    Raises:
        InputError: it is not there or cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            entries = sorted((entry.name, entry.is_dir()) for entry in found if not entry.name.startswith("."))
    except (OSError, ValueError) as error:
        place, reason = getattr(error, "filename", None) or folder, getattr(error, "strerror", None) or error
        raise InputError(f"{place}: cannot be read as a folder ({reason})") from error
    return [name for name, is_folder in entries if is_folder], [name for name, is_folder in entries if not is_folder]


def list_pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the pictures of a folder, known by their suffixes and sorted by name, and all else in it.

    Raises:
        InputError: as ``list_folder``, or there is no picture.
    """
    folders, files = list_folder(folder)
    pictures = [folder / name for name in files if name.lower().endswith(SUFFIXES)]
    if not pictures:
        raise InputError(f"{folder}: no picture in it; expected files that end in {', '.join(SUFFIXES)}")
    return pictures, [folder / name for name in (*folders, *files) if not name.lower().endswith(SUFFIXES)]
