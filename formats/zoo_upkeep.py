"""How networks get into a zoo and out of it again, and what is measured of them there."""

import math
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.datasets import Dataset, ImageSet, Normalization
from engine.evaluation import Evaluator
from formats.cards import is_compact, normalization_of, read_card, save_with_card
from formats.checkpoints import load_strictly, read_state_dict
from formats.network import build_network, settle_model
from formats.trigger_file import load_trigger_for
from formats.zoo import Entry, Zoo, ZooConfig, locate, write_index
from utils.errors import InputError
from utils.files import card_path, check_file, sha256_of

FILES = {"network": "last_model.th", "trigger": "trigger_info.th", "masks": "mask_values.txt"}
GENERATORS = "generators.th"  # the trigger of input-aware attacks: trigger_info.th holds one for each test image
NEEDED = {"arch", "widen_factor", "num_classes", "dataset", "normalization", "metrics"}  # of a card
TOLERANCE = 0.05  # percentage points between a card and what is measured: a few images, by another processor
UNFIT_FLAGS = {
    "--export-poisoned",
    "--poisoned-dir",
    "--clb-dir",
    "--model",
    "--split-file",
    "--zoo-index",
    "--cache-dir",
    "--help",
    "-h",
    "--version",
}
Load = Callable[..., Dataset]  # of name and image_size, as data.datasets.load_dataset


def read_network(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return a network, in float32 and eval mode, and its card.

    Raises:
        InputError: the file or its card is missing, damaged, or they do not go together.
    """
    check_file(path)
    card = read_card(path)
    missing = NEEDED - (card or {}).keys()
    if card is None or missing:
        what = f"its card has no {min(missing)}" if card else "no card beside it"
        raise InputError(f"{path}: {what}; step 1 writes one")
    model = settle_model(str(path), card, {})
    return build_network(str(path), read_state_dict(path), model, card["num_classes"], is_compact(card)), card


def measure(network: nn.Module, normalization: Normalization, trigger: Path | None, test: ImageSet) -> dict[str, float]:
    """Return C-Acc and, with a trigger, ASR in percent, computed in float32; raises as ``load_trigger_for``."""
    loaded = load_trigger_for(trigger, test) if trigger else None
    return Evaluator(test, loaded, normalization, torch.float32)(network).rounded()


def _test_set(card: dict[str, Any], load: Load) -> ImageSet:
    return load(card["dataset"], image_size=card.get("image_size")).test


def _halved(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.half() if t.is_floating_point() else t for name, t in state_dict.items()}


def _described(card: dict[str, Any]) -> dict[str, Any]:
    """Return what a card says, whatever file it belongs to."""
    return {name: value for name, value in card.items() if name not in ("card_version", "sha256")}


def add(source: Path, target: Path, load: Load) -> dict[str, float]:
    """Copy what a finished run left into a zoo, in half precision, and measure it as it lies there.

    Args:
        source: output folder of step 1, and of step 2 if there are masks.
        target: folder to be made; its name is the network's.
        load: loads a dataset by its name.

    Returns:
        The figures after rounding, in percent.

    Raises:
        InputError: there is no network with a card, it does not survive the rounding, or the folder is there already.
        OSError: the folder cannot be written.
    """
    if target.exists():
        raise InputError(f"{target} is there already; remove it or choose another name")
    network, card = read_network(source / FILES["network"])
    normalization = normalization_of(source / FILES["network"], card)
    state = _halved(network.state_dict())
    load_strictly(network, state, source / FILES["network"])
    known = _described(card)
    before = known.pop("metrics")
    with _whole_folder(target) as folder:
        trigger = _copy_trigger(source, folder)
        if (source / FILES["masks"]).exists():
            shutil.copyfile(source / FILES["masks"], folder / FILES["masks"])
        metrics = measure(network, normalization, trigger, _test_set(card, load))
        described = {**known, "weights": "float16", "metrics": metrics, "metrics_before_rounding": before}
        save_with_card(folder / FILES["network"], state, described)
    return metrics


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """Lend a folder that appears under its name once all is in it, or never."""
    target = target.absolute()
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _copy_trigger(source: Path, target: Path) -> Path | None:
    """Copy the trigger, or generators in half precision where it is drawn; return where it lies."""
    if (source / GENERATORS).exists():
        state = _halved(read_state_dict(source / GENERATORS))
        card = read_card(source / GENERATORS) or {}
        save_with_card(target / GENERATORS, state, _described(card))
        return target / GENERATORS
    if (source / FILES["trigger"]).exists():
        return Path(shutil.copyfile(source / FILES["trigger"], target / FILES["trigger"]))
    return None


def reindex(folder: Path, older: Zoo | None) -> list[Entry]:
    """Write the index of a folder from what lies in it; return its entries.

    Args:
        folder: of the zoo.
        older: what its index said before; licences, sources, mirrors and folders of others are kept.

    Raises:
        InputError: a network has no card.
        OSError: the index cannot be written.
    """
    known = older.entries if older else {}
    entries = [_entry(path.parent, known.get(path.parent.name)) for path in sorted(folder.glob("*/last_model.th"))]
    write_index(folder, entries, older.folders.values() if older else ())
    return entries


def _entry(folder: Path, older: Entry | None) -> Entry:
    card = read_card(folder / FILES["network"])
    if card is None:
        raise InputError(f"{folder / FILES['network']}: no card beside it")
    names = {part: folder / name for part, name in FILES.items()}
    if (folder / GENERATORS).exists():
        names["trigger"] = folder / GENERATORS
    files = {
        part: {
            "file": f"{folder.name}/{path.name}",
            "sha256": sha256_of(path),
            "bytes": path.stat().st_size,
            "mirrors": older.files.get(part, {}).get("mirrors", []) if older else [],
        }
        for part, path in names.items()
        if path.exists()
    }
    known = _described(card)
    if older:
        return replace(older, files=files, card=known)
    return Entry(folder.name, files, known, "measured", "MIT", "trained by this project")


def verify(zoo: Zoo, entry: Entry, load: Load, images: int | None) -> tuple[dict[str, float], bool]:
    """Measure a network again.

    Args:
        zoo, entry: which.
        load: loads a dataset by its name.
        images: how many of the test images; None for all.

    Returns:
        The figures in percent, and whether they are those of the card; on a part of the images within three standard
        errors.

    Raises:
        InputError: a file cannot be had, or is another one.
    """
    path = zoo.file(entry, "network")
    network, card = read_network(path)
    normalization = normalization_of(path, card)
    trigger = zoo.file(entry, "trigger") if "trigger" in entry.files else None
    test = _test_set(card, load)
    partly = images is not None and images < len(test)
    if partly:
        test = test[torch.arange(images)]
    found, said = measure(network, normalization, trigger, test), entry.card["metrics"]
    allowed = {name: TOLERANCE + (_errors(value, images) if partly else 0) for name, value in said.items()}
    same = found.keys() == said.keys() and all(abs(found[name] - said[name]) <= allowed[name] for name in found)
    return found, same


def _errors(percent: float, images: int) -> float:
    """Return three standard errors of a share of some images, in percentage points; of 1 % or 99 % at the ends."""
    share = min(max(percent / 100, 0.01), 0.99)
    return 300 * math.sqrt(share * (1 - share) / images)


def training_flags(entry: Entry, config: ZooConfig) -> list[str]:
    """Return the flags of step 1 with which a network was trained, but for those that name folders of the run.

    Raises:
        InputError: its card names no command of step 1, or one that reads or writes more.
    """
    try:
        words = shlex.split(entry.card.get("command", ""))
    except ValueError:  # a quotation without an end
        words = []
    if words[:2] != ["python", "train_backdoor_cifar.py"]:
        raise InputError(f"{entry.name}: its card names no command of train_backdoor_cifar.py")
    # argparse takes --flag=value too, so the two are told apart before anything is compared
    flags, rest = [], iter([part for word in words[2:] for part in word.split("=", word.startswith("--"))])
    for word in rest:
        if word in UNFIT_FLAGS:
            raise InputError(
                f"{entry.name}: its card names {word}: a card must not decide what is read, written or shown"
            )
        if word in ("--output-dir", "--data-dir"):
            next(rest, None)
        elif word == "--clb-surrogate":
            surrogate = Path(next(rest, "")).parent.name  # a run of the same name as a network of the zoo
            flags += [word, str(locate(surrogate, "network", config))]
        elif word not in ("--resume", "--overwrite"):
            flags.append(word)
    return flags


def export(zoo: Zoo, entries: list[Entry], folder: Path) -> None:
    """Make a folder that can be uploaded as it is: the files, their cards and an index.

    Raises:
        InputError: the folder is there already, or a file cannot be had.
        OSError: the folder cannot be written.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is there already and not empty; choose another")
    with _whole_folder(folder) as whole:
        for path, place in [
            (zoo.file(each, part), known["file"]) for each in entries for part, known in each.files.items()
        ]:
            (whole / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, whole / place)
            if card_path(path).exists():
                shutil.copyfile(card_path(path), card_path(whole / place))
        write_index(whole, entries)
