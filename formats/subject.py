"""The network that steps 2 and 3 repair, and an attacker's surrogate, with what cards and flags say about them."""

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.datasets import ImageSet, Normalization, SourceConfig, is_same_dataset
from data.split import HELD_OUT, absolute, defender_index, load_permutation, permutation_digest, split_size
from engine.evaluation import Evaluator
from engine.runtime import Runtime
from formats.cards import is_compact, read_card
from formats.checkpoints import read_state_dict
from formats.network import Loaded, add_network_flags, build_network, load_network, settle_model, try_network
from models import ModelConfig
from utils.config import Config, Range, add_flags, from_flags, setting
from utils.console import announce
from utils.errors import InputError, quote
from utils.files import sha256_of
from utils.run import Run


@dataclass(frozen=True)
class Subject:
    """The defender's view: a network to repair and clean images; no trigger, no test image.

    Attributes:
        network: in eval mode, on its device.
        normalization: of its input.
        flip: whether a mirrored image keeps its class.
        clean: the defender's clean images, on the network's device.
        card: what is known of whatever is derived from the network.
        held_out: those of them that step 2 does not see; None: it sees all.
    """

    network: nn.Module
    normalization: Normalization
    flip: bool
    clean: ImageSet
    card: dict[str, Any]
    held_out: ImageSet | None = None

    @property
    def judging(self) -> ImageSet:
        """The clean images on which the defender judges what to prune: those held out, where there are any."""
        return self.held_out or self.clean


@dataclass(frozen=True)
class SubjectConfig(Config):
    """How many clean images the defender has."""

    val_frac: float = setting(
        0.01,
        "the defender's clean images, a share of the training set; step 1 never trains on them",
        Range(0, HELD_OUT, open_low=True),
    )


def hold_out(subject: Subject, share: float) -> Subject:
    """Keep the last of a subject's clean images from step 2.

    Args:
        subject: with all of them.
        share: of the images, 0..1; 0 keeps none.

    Raises:
        InputError: too few are left on one side.
    """
    if not share:
        return subject
    count = split_size(share, len(subject.clean))
    if count < 2 or len(subject.clean) - count < 2:
        raise InputError(f"--val-split {share:g} of {len(subject.clean)} clean images holds {count} out; 2 are needed")
    return replace(subject, clean=subject.clean[:-count], held_out=subject.clean[-count:])


def add_subject_flags(parser: argparse.ArgumentParser, attack: bool = True) -> None:
    """Add what steps 2 and 3 share: the network to repair, the trigger unless it is out of place, the clean images."""
    add_network_flags(parser, attack)
    group = parser.add_argument_group("clean images")
    add_flags(group, SubjectConfig)
    add_flags(group, SourceConfig)


def _permutation(path: str, split_file: str | None, card: dict[str, Any], size: int) -> tuple[str | None, Tensor]:
    """Return the split file, None for the project's own split, and the permutation."""
    split = card.get("split", {})
    split_file = split_file or split.get("file")
    try:
        permutation = load_permutation(split_file, size)
    except InputError as error:
        hint = f" (named by the card of {path}; --split-file says where it is now)" if split.get("file") else ""
        raise InputError(f"{error}{hint}") from error
    if "sha256" not in split and not split_file:
        announce(
            f"{path}: no card names its split, and no --split-file: most of the defender's images may be among those "
            "it was trained on"
        )
    if "sha256" in split and permutation_digest(permutation) != split["sha256"]:
        raise InputError(
            f"--split-file {split_file or '(none given)'}: not the split on which {path} was trained; the defender's "
            "images would not be unseen"
        )
    return absolute(split_file), permutation


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
    if not is_same_dataset(card.get("dataset", dataset), dataset):
        raise InputError(f"{path}: a network for {quote(card['dataset'])}, but the run is on {dataset}")
    if card.get("split", {}).get("sha256", split) != split:
        raise InputError(f"{path}: trained on another split, and so perhaps on the defender's images; see --split-file")
    known = {**asdict(normalization), **card.get("normalization", {})}
    own = {"model": model.model} if model.model and "model" in card else {}
    if card.keys() & {"arch", "widen_factor", "model"}:
        model = settle_model(path, card, own)
    network = build_network(path, state_dict, model, images.num_classes, is_compact(card))
    try_network(network, model, images)
    return network, Normalization(tuple(known["mean"]), tuple(known["std"]))


def load_defender(args: argparse.Namespace, runtime: Runtime) -> tuple[Subject, Loaded]:
    """Load what a defender sees, and all that came with it; arguments and errors as for ``load_subject``."""
    source, share = from_flags(SourceConfig, args), from_flags(SubjectConfig, args).val_frac
    loaded = load_network(args, source.data_dir, runtime)
    dataset, card = loaded.dataset, loaded.card
    split_file, permutation = _permutation(loaded.path, source.split_file, card, len(dataset.train))
    clean = dataset.train[defender_index(permutation, share)]
    known_split = bool(split_file or card.get("split"))
    described = {
        **loaded.model.entries(),
        **({"compact": True} if is_compact(card) else {}),
        **dataset.describe(),
        "normalization": asdict(loaded.normalization),
        "split": {"file": split_file, "sha256": permutation_digest(permutation)} if known_split else {},
        "attack": card.get("attack"),
        "repair": card.get("repair"),
        "repaired_from": {
            "file": Path(loaded.path).name,
            "sha256": sha256_of(loaded.path),
            "layout": loaded.layout,
        },
    }
    return Subject(loaded.network, loaded.normalization, dataset.flip, clean, described), loaded


def load_subject(
    args: argparse.Namespace, runtime: Runtime, batch_size: int | None = None, held_out: float = 0.0
) -> tuple[Subject, Evaluator]:
    """Load what a defender sees and, apart from it, what the defence is judged on; print what was found.

    Args:
        args: with the flags of ``add_subject_flags``.
        runtime: where to run.
        batch_size: images in an evaluation batch; None for the evaluator's own.
        held_out: share of the clean images that step 2 does not see.

    Raises:
        InputError: as ``load_network`` and ``hold_out``, or the split is not the one on which the network was trained.
    """
    subject, loaded = load_defender(args, runtime)
    subject = hold_out(subject, held_out)
    test, clean = loaded.dataset.test, subject.judging
    sizes = {"batch_size": batch_size} if batch_size else {}
    evaluator = Evaluator(test, loaded.attack, subject.normalization, runtime.precision, clean, **sizes)
    images = sum(len(each) for each in evaluator.sets.values() if each)
    if loaded.attack is None:
        announce("no --trigger-info: clean accuracy only, the attack success rate is not known")
    kept = f" for the masks, {len(clean)} held out" if subject.held_out else ""
    announce(f"{len(subject.clean)} clean images of {loaded.dataset.name}{kept}; every row measures {images} images")
    return subject, evaluator


def remember(run: Run, subject: Subject) -> None:
    """Let a run remember what flags, card and defaults together said; raises ``InputError`` as ``Run.rely_on``."""
    card = subject.card
    facts = {name: card[name] for name in ("arch", "widen_factor", "normalization") if name in card}
    run.rely_on({**facts, "dataset": card.get("dataset_sha256") or card["dataset"]})  # a folder may have moved
