"""Published datasets, from the files their authors publish; what is not there is downloaded.

What is pickled is unpickled only where its checksum is the published one. Downloads of CIFAR, and SVHN, are left to
torchvision, which is imported where it is needed: that takes as long as importing PyTorch.
"""

import csv
import hashlib
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.pictures import list_folder, list_pictures, read_pictures, squash
from utils.console import announce
from utils.errors import InputError, quote
from utils.files import check_file, read_text

Labelled = tuple[Tensor, Tensor]
Parts = tuple[Labelled, Labelled, tuple[str, ...]]  # as data.image_folder returns them

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_FOLDER, CIFAR100_FOLDER = "cifar-10-batches-py", "cifar-100-python"
CIFAR10_FILES = {  # MD5; the last is the test set
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CIFAR100_FILES = {  # the names of its classes first
    "meta": "7973b15100ade9c7d40fb424638fde48",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
SVHN_PAGE = "http://ufldl.stanford.edu/housenumbers/"
GTSRB_PAGE = "https://benchmark.ini.rub.de/"
_ERDA = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
GTSRB_ARCHIVES = {  # URL: MD5
    f"{_ERDA}GTSRB_Final_Training_Images.zip": "f33fd80ac59bff73c82d25ab499e03a3",
    f"{_ERDA}GTSRB_Final_Test_Images.zip": "c7e4e6327067d32654124b0fe9e82185",
    f"{_ERDA}GTSRB_Final_Test_GT.zip": "fe31e9c9270bbcd7b84b7f21a9d9d9e5",
}
GTSRB_SIZE = (32, 32)
# Images in each folder. The first is the training set of the benchmark; torchvision downloads the second, which is that
# of the competition before it.
GTSRB_TRAINING = {"Final_Training/Images": 39_209, "Training": 26_640}
GTSRB_TEST = 12_630
GTSRB_CLASSES = (
    *(f"limit {speed}" for speed in (20, 30, 50, 60, 70, 80)),
    "end of limit 80", "limit 100", "limit 120", "no passing", "trucks: no passing", "right of way", "priority road",
    "yield", "stop", "no vehicles", "no trucks", "no entry", "caution", "curve left", "curve right", "double curve",
    "bumpy road", "slippery road", "road narrows", "road work", "traffic signals", "pedestrians", "children",
    "bicycles", "ice or snow", "wild animals", "end of limits", "turn right", "turn left", "ahead only",
    "ahead or right", "ahead or left", "keep right", "keep left", "roundabout", "passing again", "trucks: pass again",
)  # fmt: skip
TINY_IMAGENET = "tiny-imagenet-200"  # name and folder
TINY_IMAGENET_ARCHIVE = {f"http://cs231n.stanford.edu/{TINY_IMAGENET}.zip": "90528d7ca1a48142e341f4ef8d21d0de"}
TINY_IMAGENET_SIZE = (64, 64)
TINY_IMAGENET_COUNTS = (200, 100_000, 10_000)  # classes, training images, test images


def _download(download: Callable[[], Any], title: str, root: Path, remedy: str) -> Any:
    """Return what ``download`` returns.

    Raises:
        InputError: it failed; the message says what to do instead.
    """
    announce(f"{title} is not in {root.absolute()}: downloading it")
    try:
        return download()
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"no intact {title} in {root.absolute()} and the download failed ({reason}): {remedy}, name its folder "
            "with --data-dir, or use --dataset synthetic"
        ) from error


def _unpickle(folder: Path, files: dict[str, str]) -> list[dict[str, Any]]:
    """Return what is in some pickled files.

    Args:
        folder: where they lie.
        files: MD5 by name.

    Raises:
        InputError: one of them is missing or has another checksum.
    """
    for name in files:
        check_file(folder / name)
    with ThreadPoolExecutor() as pool:
        contents = list(pool.map(lambda name: (folder / name).read_bytes(), files))
        sums = list(pool.map(lambda content: hashlib.md5(content, usedforsecurity=False).hexdigest(), contents))
    for name, found in zip(files, sums, strict=True):
        if found != files[name]:
            raise InputError(f"{folder / name}: its MD5 is {found}, that of the published file {files[name]}")
    return [pickle.loads(content, encoding="latin1") for content in contents]


def _read_cifar(name: str, folder: Path, files: dict[str, str], title: str) -> list[dict[str, Any]]:
    """Return what is in the files of a CIFAR, downloaded by torchvision's class of that name where it has to be.

    Raises:
        InputError: a file is missing or damaged, and cannot be downloaded.
    """
    try:
        return _unpickle(folder, files)
    except InputError as error:
        from torchvision import datasets

        announce(str(error))
        kind, root = getattr(datasets, name), folder.parent
        remedy = f"unpack there {kind.filename} from {CIFAR_PAGE}"
        _download(lambda: kind(root, download=True), title, root, remedy)
        return _unpickle(folder, files)


def _labelled(batches: list[dict[str, Any]], labels: str) -> Labelled:
    """Return images (N, H, W, 3) and labels of unpickled batches."""
    planes = torch.cat([torch.from_numpy(batch["data"]) for batch in batches]).view(-1, 3, 32, 32)
    images = planes.permute(0, 2, 3, 1).contiguous()
    return images, torch.tensor([label for batch in batches for label in batch[labels]])


def read_cifar10(root: Path) -> Parts:
    """Read CIFAR-10 (Krizhevsky 2009); raises ``InputError`` where it is not there and cannot be downloaded."""
    *train, test = _read_cifar("CIFAR10", root / CIFAR10_FOLDER, CIFAR10_FILES, "CIFAR-10")
    return _labelled(train, "labels"), _labelled([test], "labels"), CIFAR10_CLASSES


def read_cifar100(root: Path) -> Parts:
    """Read CIFAR-100 (Krizhevsky 2009) with its fine labels; raises as ``read_cifar10``."""
    meta, *parts = _read_cifar("CIFAR100", root / CIFAR100_FOLDER, CIFAR100_FILES, "CIFAR-100")
    train, test = (_labelled([part], "fine_labels") for part in parts)
    return train, test, tuple(meta["fine_label_names"])


def read_svhn(root: Path) -> Parts:
    """Read SVHN (Netzer et al. 2011), cropped digits without the extra set; 0 is the digit 0. As ``read_cifar10``."""
    from torchvision.datasets import SVHN

    try:
        parts = [SVHN(root, split) for split in ("train", "test")]
    except RuntimeError:  # so torchvision says that a file is missing or has another checksum
        remedy = f"put there train_32x32.mat and test_32x32.mat from {SVHN_PAGE}"
        download = partial(SVHN, root, download=True)
        parts = _download(lambda: [download(split) for split in ("train", "test")], "SVHN", root, remedy)
    train, test = ((torch.from_numpy(part.data).permute(0, 2, 3, 1).contiguous(), part.labels) for part in parts)
    digits = tuple(map(str, range(10)))
    return (train[0], torch.from_numpy(train[1])), (test[0], torch.from_numpy(test[1])), digits


def _fetch(archives: dict[str, str], folder: Path) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    for url, md5 in archives.items():
        download_and_extract_archive(url, str(folder), md5=md5)


def _check_count(place: Path, found: int, expected: int, what: str = "images") -> None:
    if found != expected:
        raise InputError(
            f"{place}: {found} {what}, expected {expected}; remove the folder and unpack the archive again"
        )


def _gtsrb_training(folder: Path) -> tuple[list[Path], Tensor]:
    """Return the pictures of the training set, by class and name, and their labels."""
    name = next(name for name in GTSRB_TRAINING if (folder / name).is_dir())
    classes = [list_pictures(folder / name / f"{label:05d}")[0] for label in range(len(GTSRB_CLASSES))]
    labels = torch.tensor([label for label, paths in enumerate(classes) for _ in paths])
    _check_count(folder / name, len(labels), GTSRB_TRAINING[name])
    whole = next(iter(GTSRB_TRAINING))
    if name != whole:
        announce(
            f"{folder / name}: {len(labels)} training images; the benchmark's {GTSRB_TRAINING[whole]} are in {whole}"
        )
    return [path for paths in classes for path in paths], labels


def _gtsrb_test(folder: Path) -> tuple[list[Path], Tensor]:
    """Return the pictures of the test set, in the order of its table, and their labels."""
    table = folder.parent / "GT-final_test.csv"
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(table), newline=""), delimiter=";"))
        names, labels = [row["Filename"] for row in rows], [int(row["ClassId"]) for row in rows]
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{table}: expected the table of the test images, with Filename;...;ClassId") from error
    _check_names(table, names)
    if not all(0 <= label < len(GTSRB_CLASSES) for label in labels):
        raise InputError(f"{table}: a ClassId is outside 0..{len(GTSRB_CLASSES) - 1}")
    _check_count(table, len(names), GTSRB_TEST)
    return [folder / "Final_Test" / "Images" / name for name in names], torch.tensor(labels)


def _check_names(table: Path, names: list[str]) -> None:
    bad = [name for name in names if Path(name).name != name]
    if bad:
        raise InputError(f"{table}: {quote(bad[0])} is no name of a file beside the others")


def read_gtsrb(root: Path) -> Parts:
    """Read the German traffic signs (Stallkamp et al. 2012) from ``gtsrb/GTSRB``, resized to 32x32 as is usual.

    Raises:
        InputError: as ``read_cifar10``, or a file is missing, damaged or one too many.
    """
    folder = root / "gtsrb" / "GTSRB"
    if not any((folder / name).is_dir() for name in GTSRB_TRAINING) or not (folder / "Final_Test").is_dir():
        names = ", ".join(url.rpartition("/")[2] for url in GTSRB_ARCHIVES)
        remedy = f"unpack {names} from {GTSRB_PAGE} in its folder gtsrb"
        _download(lambda: _fetch(GTSRB_ARCHIVES, root / "gtsrb"), "GTSRB", root, remedy)
    parts = _gtsrb_training(folder), _gtsrb_test(folder)
    train, test = ((read_pictures(paths, GTSRB_SIZE, resize=squash), labels) for paths, labels in parts)
    return train, test, GTSRB_CLASSES


def _tiny_imagenet_test(folder: Path, wnids: list[str]) -> tuple[list[Path], Tensor]:
    """Return the pictures of the validation set, in the order of its table, and their labels."""
    table = folder / "val_annotations.txt"
    rows = [line.split("\t") for line in read_text(table).splitlines()]
    if any(len(row) < 2 or row[1] not in wnids for row in rows):
        raise InputError(f"{table}: expected a picture and one of the {len(wnids)} classes in each line")
    names = [row[0] for row in rows]
    _check_names(table, names)
    return [folder / "images" / name for name in names], torch.tensor([wnids.index(row[1]) for row in rows])


def read_tiny_imagenet(root: Path) -> Parts:
    """Read Tiny-ImageNet-200 (Stanford CS231N) from ``tiny-imagenet-200``; its validation set is the test set.

    The published test set has no labels. Classes are in the order of their WordNet numbers.

    Raises:
        InputError: as ``read_cifar10``, or a file is missing, damaged or one too many.
    """
    folder = root / TINY_IMAGENET
    if not (folder / "val").is_dir():
        remedy = f"unpack there {next(iter(TINY_IMAGENET_ARCHIVE))}"
        _download(lambda: _fetch(TINY_IMAGENET_ARCHIVE, root), "Tiny-ImageNet", root, remedy)
    wnids, _ = list_folder(folder / "train")
    _check_count(folder / "train", len(wnids), TINY_IMAGENET_COUNTS[0], "classes")
    classes = [list_pictures(folder / "train" / wnid / "images")[0] for wnid in wnids]
    train = [path for paths in classes for path in paths]
    labels = torch.tensor([label for label, paths in enumerate(classes) for _ in paths])
    test, test_labels = _tiny_imagenet_test(folder / "val", wnids)
    _check_count(folder / "train", len(train), TINY_IMAGENET_COUNTS[1])
    _check_count(folder / "val", len(test), TINY_IMAGENET_COUNTS[2])
    words = dict(line.split("\t", 1) for line in read_text(folder / "words.txt").splitlines() if "\t" in line)
    names = tuple(words.get(wnid, wnid).partition(",")[0] for wnid in wnids)
    train, test = (read_pictures(paths, TINY_IMAGENET_SIZE, "expected 64x64") for paths in (train, test))
    return (train, labels), (test, test_labels), names
