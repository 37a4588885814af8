"""The network that steps 2 and 3 repair, and an attacker's surrogate, with what cards and flags say about them."""

from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.datasets import Dataset, ImageSet, Normalization, load_dataset
from data.errors import InputError
from data.split import absolute, defender_index, load_permutation, permutation_digest
from models import build_model
from utils.arguments import DEFAULT_ARCH, DEFAULT_DATASET, DEFAULT_WIDTH
from utils.cards import read_card
from utils.checkpoints import load_strictly, read_state_dict
from utils.evaluation import EVALUATION_BATCH, Evaluator
from utils.files import sha256_of
from utils.run import announce
from utils.runtime import Runtime
from utils.trigger_file import load_trigger


@dataclass(frozen=True)
class Subject:
    """A loaded network, the defender's images, the evaluation, and the card of what is derived from it."""

    network: nn.Module
    normalization: Normalization
    defender: ImageSet
    evaluator: Evaluator
    card: dict[str, Any]


class _Settings:
    """Flags and card in one: they must agree, and a default stands where neither speaks."""

    def __init__(self, args: Namespace, card: dict[str, Any] | None):
        self.args, self.card = args, card

    def __call__(self, name: str, default: Any, card_value: Any = None) -> Any:
        given = getattr(self.args, name)
        known = self.card.get(name, card_value) if self.card else None
        if given is not None and known is not None and given != known:
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"{flag} {given} contradicts the card of {self.args.checkpoint}, which says {known}; leave the flag out"
            )
        return next(value for value in (given, known, default) if value is not None)


def _permutation(args: Namespace, card: dict[str, Any] | None, size: int) -> tuple[str | None, Tensor]:
    """Return the split file, None for the project's own split, and the permutation."""
    split = (card or {}).get("split", {})
    path = args.split_file or split.get("file")
    permutation = load_permutation(path, size)
    if "sha256" not in split and not path:
        announce(
            f"{args.checkpoint}: no card and no --split-file: most of the defender's images may be among those it was "
            "trained on"
        )
    if "sha256" in split and permutation_digest(permutation) != split["sha256"]:
        raise InputError(
            f"--split-file {path or '(none given)'}: not the split on which "
            f"{args.checkpoint} was trained; the defender's images would not be unseen"
        )
    return absolute(path), permutation


def _normalization(settings: _Settings, dataset: Dataset) -> Normalization:
    known = (settings.card or {}).get("normalization", {})
    own = dataset.normalization
    return Normalization(*(tuple(settings(name, getattr(own, name), known.get(name))) for name in ("mean", "std")))


def _build(path: str, state_dict: dict[str, Tensor], arch: str, classes: int, width: float) -> nn.Module:
    network = build_model(arch, classes, width)
    load_strictly(network, state_dict, path)
    return network.to(memory_format=torch.channels_last).eval()


def load_surrogate(
    path: str, args: Namespace, dataset: Dataset, permutation: Tensor
) -> tuple[nn.Module, Normalization]:
    """Load the network that an attacker builds a poisoned set against.

    Args:
        path: its checkpoint. Without a card it is taken to have the architecture of the network to train.
        args: with ``arch`` and ``widen_factor``.
        dataset: of the run.
        permutation: the split; a surrogate of another split would know the defender's images.

    Raises:
        InputError: the file is missing, damaged or hostile, does not fit, or its card names another dataset or split.
    """
    state_dict, card = read_state_dict(path), read_card(path)
    if card is None:
        announce(f"{path}: no card: it may have been trained on the defender's images")
        card = {}
    if card.get("attack", {}).get("poison_type", "benign") != "benign":
        announce(f"{path}: its card says that it is backdoored itself; a surrogate should be a clean network")
    if card.get("dataset", dataset.name) != dataset.name:
        raise InputError(f"{path}: a network for {card['dataset']}, but the run is on {dataset.name}")
    digest = permutation_digest(permutation)
    if card.get("split", {}).get("sha256", digest) != digest:
        raise InputError(f"{path}: trained on another split, and so perhaps on the defender's images; see --split-file")
    known = {**asdict(dataset.normalization), **card.get("normalization", {})}
    arch, width = card.get("arch", args.arch), card.get("widen_factor", args.widen_factor)
    network = _build(path, state_dict, arch, dataset.num_classes, width)
    return network, Normalization(tuple(known["mean"]), tuple(known["std"]))


def load_subject(args: Namespace, runtime: Runtime, evaluation_batch: int = EVALUATION_BATCH) -> Subject:
    """Load the network of steps 2 and 3 and everything it is judged on, and print what was found.

    Args:
        args: with the flags of ``add_network_arguments``.
        runtime: where to run.
        evaluation_batch: images in an evaluation batch.

    Raises:
        InputError: a file is missing, damaged or hostile, does not fit, or contradicts a flag.
    """
    state_dict = read_state_dict(args.checkpoint)
    card = read_card(args.checkpoint)
    settings = _Settings(args, card)
    arch, width = settings("arch", DEFAULT_ARCH), settings("widen_factor", DEFAULT_WIDTH)
    name = settings("dataset", DEFAULT_DATASET)
    dataset = load_dataset(name, args.data_dir, runtime.device)
    classes = (card or {}).get("num_classes", dataset.num_classes)
    if classes != dataset.num_classes:
        raise InputError(f"{args.checkpoint}: {classes} classes, but {name} has {dataset.num_classes}")
    network = _build(args.checkpoint, state_dict, arch, classes, width)
    trigger = load_trigger(args.trigger_info, dataset.num_classes) if args.trigger_info else None
    normalization = _normalization(settings, dataset)
    split_file, permutation = _permutation(args, card, len(dataset.train))
    defender = dataset.train[defender_index(permutation, args.val_frac)]
    source = "its card" if card else "flags and defaults (no card)"
    announce(
        f"{args.checkpoint}: {arch}, width {width}, mean {normalization.mean}, std {normalization.std}, "
        f"from {source}; {len(defender)} clean images of {name}"
    )
    if trigger is None:
        announce("no --trigger-info: clean accuracy only, the attack success rate is not known")
    return Subject(
        network.to(runtime.device),
        normalization,
        defender,
        Evaluator(dataset.test, trigger, defender, normalization, runtime.precision, evaluation_batch),
        {
            "arch": arch,
            "widen_factor": width,
            "num_classes": classes,
            "dataset": name,
            "normalization": asdict(normalization),
            "split": {"file": split_file, "sha256": permutation_digest(permutation)},
            "attack": (card or {}).get("attack"),
            "repaired_from": {"file": Path(args.checkpoint).name, "sha256": sha256_of(args.checkpoint)},
        },
    )
