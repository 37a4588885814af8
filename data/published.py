"""Published datasets, from the files their authors publish; what is not there is downloaded.

Pickled files are read by torchvision alone, which verifies their checksums first. It is imported where it is needed:
that takes as long as importing PyTorch.
"""

import csv
import importlib.util
import io
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.pictures import list_folder, list_pictures, read_pictures, squash
from utils.console import announce
from utils.errors import InputError, quote
from utils.files import read_text

Labelled = tuple[Tensor, Tensor]
Parts = tuple[Labelled, Labelled, tuple[str, ...]]  # as data.image_folder returns them

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
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


def _read_torchvision(
    kind: Callable[..., Any], root: Path, parts: list[dict[str, Any]], title: str, remedy: str
) -> list[Any]:
    """Return torchvision's training and test set, downloaded first where there is no intact copy."""
    try:
        return [kind(root, **part) for part in parts]
    except RuntimeError:  # so torchvision says that a file is missing or has another checksum
        return _download(lambda: [kind(root, **part, download=True) for part in parts], title, root, remedy)


def _read_cifar(kind: Callable[..., Any], root: Path, title: str) -> tuple[Labelled, Labelled, Any]:
    remedy = f"unpack there {kind.filename} from {CIFAR_PAGE}"
    parts = _read_torchvision(kind, root, [{"train": True}, {"train": False}], title, remedy)
    labelled = ((torch.from_numpy(part.data), torch.tensor(part.targets)) for part in parts)
    return *labelled, parts[0]


def read_cifar10(root: Path) -> Parts:
    """Read CIFAR-10 (Krizhevsky 2009); raises ``InputError`` where it is not there and cannot be downloaded."""
    from torchvision.datasets import CIFAR10

    train, test, _ = _read_cifar(CIFAR10, root, "CIFAR-10")
    return train, test, CIFAR10_CLASSES


def read_cifar100(root: Path) -> Parts:
    """Read CIFAR-100 (Krizhevsky 2009) with its fine labels; raises as ``read_cifar10``."""
    from torchvision.datasets import CIFAR100

    train, test, whole = _read_cifar(CIFAR100, root, "CIFAR-100")
    return train, test, tuple(whole.classes)


def read_svhn(root: Path) -> Parts:
    """Read SVHN (Netzer et al. 2011), cropped digits without the extra set; label 0 is the digit 0.

    Raises:
        InputError: as ``read_cifar10``, or SciPy, which reads its files, is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise InputError("--dataset svhn: its .mat files are read with SciPy, which is not there: pip install scipy")
    from torchvision.datasets import SVHN

    remedy = f"put there train_32x32.mat and test_32x32.mat from {SVHN_PAGE}"
    parts = _read_torchvision(SVHN, root, [{"split": "train"}, {"split": "test"}], "SVHN", remedy)
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
