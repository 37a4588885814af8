"""A network from a file, with what its card and the flags say about it, and its trigger, if that is known."""

import argparse
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data.datasets import MEANS, STDS, DataConfig, Dataset, ImageSet, Normalization, load_dataset
from data.triggers import Trigger, count_unchanged, triggered_test_set
from engine.memory import check_memory, on_meta, parameter_bytes
from engine.runtime import Runtime
from formats.cards import read_card
from formats.checkpoints import load_strictly, read_state_dict
from formats.trigger_file import load_trigger
from models import ARCHITECTURES, ModelConfig, build_model
from utils.config import Config, InputFile, add_flags, from_flags, given_flags, required, setting
from utils.console import announce
from utils.errors import InputError, quote
from utils.files import card_path

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class NetworkConfig(Config):
    """The network and what it expects."""

    checkpoint: InputFile = required("the backdoored network", flag="--checkpoint --checkpoints", metavar="FILE")
    trigger_info: InputFile | None = setting(
        None, "the trigger, to report the ASR; without it only clean accuracy is reported", metavar="FILE"
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


@dataclass(frozen=True)
class Loaded:
    """A network as it came, and what it is measured on.

    Attributes:
        path: its file.
        network: in eval mode, on its device.
        model: what it is.
        dataset: for which it was made.
        normalization: of its input.
        trigger: of its attacker; None where it is unknown.
        card: empty where there is none.
    """

    path: str
    network: nn.Module
    model: ModelConfig
    dataset: Dataset
    normalization: Normalization
    trigger: Trigger | None
    card: dict[str, Any]

    def build(self) -> nn.Module:
        """Build the network anew, with other weights."""
        return build_model(self.model.arch, self.dataset.num_classes, self.model.widen_factor)


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """Add the network, its trigger, and what a card may say of them."""
    add_flags(parser.add_argument_group("network"), NetworkConfig)
    add_flags(parser.add_argument_group("model"), ModelConfig, card=True)
    add_flags(parser.add_argument_group("data"), DataConfig, card=True)


def load_network(args: argparse.Namespace, data_dir: str, runtime: Runtime) -> Loaded:
    """Load a network, its trigger and its dataset; print what was found.

    Args:
        args: with the flags of ``add_network_flags``.
        data_dir: where the dataset's files are.
        runtime: where to run.

    Raises:
        InputError: a file is missing, damaged or hostile, does not fit, or contradicts a flag.
    """
    config = from_flags(NetworkConfig, args)
    path = config.checkpoint
    state_dict, card = read_state_dict(path), read_card(path)
    model = _settled(ModelConfig, args, path, card)
    dataset = load_dataset(_settled(DataConfig, args, path, card).dataset, data_dir, runtime.device)
    _check_classes(path, card, dataset)
    network = build_network(path, state_dict, model.arch, model.widen_factor, dataset.num_classes)
    trigger = load_trigger(config.trigger_info, dataset.num_classes) if config.trigger_info else None
    normalization = _normalization(config, card, dataset.normalization)
    announce(
        f"{path}: {model.arch}, width {model.widen_factor}, mean {normalization.mean}, std {normalization.std}, "
        f"from {'its card' if card else 'flags and defaults (no card)'}"
    )
    if card is None:
        announce(f"{path}: no card, so nothing says whether these are the bytes that its author published")
    if trigger:
        _check_effect(config.trigger_info, dataset.test, trigger)
    else:
        announce("no --trigger-info: clean accuracy only, the attack success rate is not known")
    return Loaded(path, network.to(runtime.device), model, dataset, normalization, trigger, card or {})


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


def _normalization(config: NetworkConfig, card: dict[str, Any] | None, own: Normalization) -> Normalization:
    """Return what flag, card or dataset say, in this order; a card's lists become tuples."""
    known = {name: tuple(value) for name, value in (card or {}).get("normalization", {}).items()}
    parts = {name: _agree(config.checkpoint, name, getattr(config, name), known.get(name)) for name in ("mean", "std")}
    return Normalization(**{name: part or getattr(own, name) for name, part in parts.items()})


def build_network(path: str, state_dict: dict[str, Tensor], arch: str, width: float, classes: int) -> nn.Module:
    """Build a network on the CPU, in eval mode, and load its weights.

    Raises:
        InputError: it cannot be built here, is too large for the memory, or the weights do not fit.
    """
    if arch not in ARCHITECTURES:
        raise InputError(f"{path}: its card says {quote(arch)}, but only {', '.join(ARCHITECTURES)} can be built here")
    build = partial(build_model, arch, classes, width)
    advice = "look at --widen-factor or the card"
    check_memory(parameter_bytes(on_meta(build)), f"{path}: {arch} of width {width}", advice, torch.device("cpu"))
    network = build()
    load_strictly(network, state_dict, path)
    return network.to(memory_format=torch.channels_last).eval()


def _check_effect(path: str, test: ImageSet, trigger: Trigger) -> None:
    """Refuse a trigger that changes no test image, and say so where it leaves some as they are."""
    triggered = triggered_test_set(test, trigger)
    unchanged, count = count_unchanged(test, trigger, triggered), len(triggered)
    if unchanged == count:
        raise InputError(f"{path}: this trigger changes none of {count} test images; its success rate would be none")
    if unchanged:
        announce(f"warning: {path}: this trigger leaves {unchanged} of {count} test images as they are")


def _check_classes(path: str, card: dict[str, Any] | None, dataset: Dataset) -> None:
    classes = (card or {}).get("num_classes", dataset.num_classes)
    if classes != dataset.num_classes:
        raise InputError(f"{path}: {classes} classes, but {dataset.name} has {dataset.num_classes}")
