"""The network that steps 2 and 3 repair, and an attacker's surrogate, with what cards and flags say about them."""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data.datasets import MEANS, STDS, DataConfig, Dataset, ImageSet, Normalization, SourceConfig, load_dataset
from data.split import HELD_OUT, absolute, defender_index, load_permutation, permutation_digest
from data.triggers import Trigger, count_unchanged
from engine.evaluation import Evaluator
from engine.memory import check_memory, on_meta, parameter_bytes
from engine.runtime import Runtime
from formats.cards import card_path, read_card
from formats.checkpoints import load_strictly, read_state_dict
from formats.trigger_file import load_trigger
from models import ARCHITECTURES, ModelConfig, build_model
from utils.config import Config, InputFile, Range, add_flags, from_flags, given_flags, required, setting
from utils.console import announce
from utils.errors import InputError, quote
from utils.files import sha256_of

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Subject:
    """The defender's view: a network to repair and clean images; no trigger, no test image.

    Attributes:
        network: in eval mode, on its device.
        normalization: of its input.
        flip: whether a mirrored image keeps its class.
        clean: the defender's clean images, on the network's device.
        card: what is known of whatever is derived from the network.
    """

    network: nn.Module
    normalization: Normalization
    flip: bool
    clean: ImageSet
    card: dict[str, Any]


@dataclass(frozen=True)
class SubjectConfig(Config):
    """The network to repair, and who knows what about it."""

    checkpoint: InputFile = required("the backdoored network", flag="--checkpoint --checkpoints", metavar="FILE")
    trigger_info: InputFile | None = setting(
        None, "the trigger, to report the ASR; without it only clean accuracy is reported", metavar="FILE"
    )
    val_frac: float = setting(
        0.01,
        "the defender's clean images, a share of the training set; step 1 never trains on them",
        Range(0, HELD_OUT, open_low=True),
    )
    mean: tuple[float, float, float] | None = setting(
        None,
        "mean with which the network's input is normalised, on the 0..1 scale "
        "(default: the card's, else the dataset's)",
        MEANS,
    )
    std: tuple[float, float, float] | None = setting(
        None,
        "standard deviation with which it is normalised, on the 0..1 scale (default: the card's, else the dataset's)",
        STDS,
    )


def add_subject_flags(parser: argparse.ArgumentParser) -> None:
    """Add what steps 2 and 3 share: the network to repair, the trigger, the defender's share."""
    add_flags(parser.add_argument_group("network to repair"), SubjectConfig)
    add_flags(parser.add_argument_group("model"), ModelConfig, card=True)
    data = parser.add_argument_group("data")
    add_flags(data, DataConfig, card=True)
    add_flags(data, SourceConfig)


def _agree(path: str, name: str, given: Any, known: Any) -> Any:
    """Return what flag or card says, None where neither speaks.

    Raises:
        InputError: they contradict each other.
    """
    if given is not None and known is not None and given != known:
        flag = "--" + name.replace("_", "-")
        raise InputError(
            f"{flag} {given} contradicts the card of {path}, which says {quote(known)}; leave the flag out"
        )
    return known if given is None else given


def _settled(config: type[C], args: argparse.Namespace, path: str, card: dict[str, Any] | None) -> C:
    """Return a config of which flags and card each know some values, and the defaults the rest.

    Raises:
        InputError: flag and card contradict each other, or the card's value is none of the choices here.
    """
    given, card = given_flags(args, config), card or {}
    values = {name: _agree(path, name, given.get(name), card.get(name)) for name in config.__dataclass_fields__}
    try:
        return config(**{name: value for name, value in values.items() if value is not None})
    except ValueError as error:  # flags were checked when they were parsed
        raise InputError(f"{card_path(path)}: {str(error).removeprefix(config.__name__ + '.')}") from error


def _permutation(
    path: str, split_file: str | None, card: dict[str, Any] | None, size: int
) -> tuple[str | None, Tensor]:
    """Return the split file, None for the project's own split, and the permutation."""
    split = (card or {}).get("split", {})
    split_file = split_file or split.get("file")
    try:
        permutation = load_permutation(split_file, size)
    except InputError as error:
        hint = f" (named by the card of {path}; --split-file says where it is now)" if split.get("file") else ""
        raise InputError(f"{error}{hint}") from error
    if "sha256" not in split and not split_file:
        announce(
            f"{path}: no card and no --split-file: most of the defender's images may be among those it was trained on"
        )
    if "sha256" in split and permutation_digest(permutation) != split["sha256"]:
        raise InputError(
            f"--split-file {split_file or '(none given)'}: not the split on which {path} was trained; the defender's "
            "images would not be unseen"
        )
    return absolute(split_file), permutation


def _normalization(config: SubjectConfig, card: dict[str, Any] | None, own: Normalization) -> Normalization:
    """Return what flag, card or dataset say, in this order; a card's lists become tuples."""
    known = {name: tuple(value) for name, value in (card or {}).get("normalization", {}).items()}
    parts = {name: _agree(config.checkpoint, name, getattr(config, name), known.get(name)) for name in ("mean", "std")}
    return Normalization(**{name: part or getattr(own, name) for name, part in parts.items()})


def _build(path: str, state_dict: dict[str, Tensor], arch: str, width: float, classes: int) -> nn.Module:
    if arch not in ARCHITECTURES:
        raise InputError(f"{path}: its card says {quote(arch)}, but only {', '.join(ARCHITECTURES)} can be built here")
    build = partial(build_model, arch, classes, width)
    advice = "look at --widen-factor or the card"
    check_memory(parameter_bytes(on_meta(build)), f"{path}: {arch} of width {width}", advice, torch.device("cpu"))
    network = build()
    load_strictly(network, state_dict, path)
    return network.to(memory_format=torch.channels_last).eval()


def load_surrogate(
    path: str, model: ModelConfig, dataset: str, images: ImageSet, normalization: Normalization, split: str
) -> tuple[nn.Module, Normalization]:
    """Load the network that an attacker builds a poisoned set against.

    Args:
        path: its checkpoint.
        model: what it is taken to be where it has no card.
        dataset: name of the dataset of the run.
        images: of that dataset.
        normalization: of the network's input where it has no card.
        split: digest of the run's split; a surrogate of another split would know the defender's images.

    Returns:
        The network, on the CPU and in eval mode, and the normalisation of its input.

    Raises:
        InputError: the file is missing, damaged or hostile, does not fit, or its card names another dataset or split.
    """
    state_dict, card = read_state_dict(path), read_card(path)
    if card is None:
        announce(f"{path}: no card: it may have been trained on the defender's images")
        card = {}
    if (card.get("attack") or {}).get("poison_type", "benign") != "benign":
        announce(f"{path}: its card says that it is backdoored itself; a surrogate should be a clean network")
    if card.get("dataset", dataset) != dataset:
        raise InputError(f"{path}: a network for {quote(card['dataset'])}, but the run is on {dataset}")
    if card.get("split", {}).get("sha256", split) != split:
        raise InputError(f"{path}: trained on another split, and so perhaps on the defender's images; see --split-file")
    known = {**asdict(normalization), **card.get("normalization", {})}
    arch, width = card.get("arch", model.arch), card.get("widen_factor", model.widen_factor)
    network = _build(path, state_dict, arch, width, images.num_classes)
    return network, Normalization(tuple(known["mean"]), tuple(known["std"]))


def load_subject(
    args: argparse.Namespace, runtime: Runtime, batch_size: int | None = None
) -> tuple[Subject, Evaluator]:
    """Load what a defender sees and, apart from it, what the defence is judged on; print what was found.

    Args:
        args: with the flags of ``add_subject_flags``.
        runtime: where to run.
        batch_size: images in an evaluation batch; None for the evaluator's own.

    Raises:
        InputError: a file is missing, damaged or hostile, does not fit, or contradicts a flag.
    """
    config = from_flags(SubjectConfig, args)
    path = config.checkpoint
    state_dict, card = read_state_dict(path), read_card(path)
    model = _settled(ModelConfig, args, path, card)
    name = _settled(DataConfig, args, path, card).dataset
    source = from_flags(SourceConfig, args)
    dataset = load_dataset(name, source.data_dir, runtime.device)
    _check_classes(path, card, dataset)
    network = _build(path, state_dict, model.arch, model.widen_factor, dataset.num_classes)
    trigger = load_trigger(config.trigger_info, dataset.num_classes) if config.trigger_info else None
    if card is None:
        announce(f"{path}: no card, so nothing says whether these are the bytes that its author published")
    normalization = _normalization(config, card, dataset.normalization)
    split_file, permutation = _permutation(path, source.split_file, card, len(dataset.train))
    clean = dataset.train[defender_index(permutation, config.val_frac)]
    announce(
        f"{path}: {model.arch}, width {model.widen_factor}, mean {normalization.mean}, std {normalization.std}, "
        f"from {'its card' if card else 'flags and defaults (no card)'}; {len(clean)} clean images of {name}"
    )
    if trigger is None:
        announce("no --trigger-info: clean accuracy only, the attack success rate is not known")
    known_split = bool(split_file or (card or {}).get("split"))
    described = {
        **asdict(model),
        "num_classes": dataset.num_classes,
        "dataset": name,
        "normalization": asdict(normalization),
        "split": {"file": split_file, "sha256": permutation_digest(permutation)} if known_split else {},
        "attack": (card or {}).get("attack"),
        "repaired_from": {"file": Path(path).name, "sha256": sha256_of(path)},
    }
    subject = Subject(network.to(runtime.device), normalization, dataset.flip, clean, described)
    sizes = {"batch_size": batch_size} if batch_size else {}
    evaluator = Evaluator(dataset.test, trigger, normalization, runtime.precision, clean, **sizes)
    if trigger:
        _check_effect(config.trigger_info, dataset.test, trigger, evaluator.sets["triggered"])
    announce(f"every row measures {sum(len(each) for each in evaluator.sets.values() if each)} images")
    return subject, evaluator


def builder_of(subject: Subject) -> Callable[[], nn.Module]:
    """Return a function that builds the subject's network anew, with other weights."""
    card = subject.card
    return partial(build_model, card["arch"], card["num_classes"], card["widen_factor"])


def _check_effect(path: str, test: ImageSet, trigger: Trigger, triggered: ImageSet) -> None:
    """Refuse a trigger that changes no test image, and say so where it leaves some as they are."""
    unchanged, count = count_unchanged(test, trigger, triggered), len(triggered)
    if unchanged == count:
        raise InputError(f"{path}: this trigger changes none of {count} test images; its success rate would be none")
    if unchanged:
        announce(f"warning: {path}: this trigger leaves {unchanged} of {count} test images as they are")


def _check_classes(path: str, card: dict[str, Any] | None, dataset: Dataset) -> None:
    classes = (card or {}).get("num_classes", dataset.num_classes)
    if classes != dataset.num_classes:
        raise InputError(f"{path}: {classes} classes, but {dataset.name} has {dataset.num_classes}")
