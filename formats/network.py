"""A network from a file, with what its card and the flags say about it, and its trigger, if that is known."""

import argparse
import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from data.datasets import (
    MEANS,
    STDS,
    DataConfig,
    Dataset,
    ImageSet,
    Normalization,
    is_same_dataset,
    load_dataset,
)
from data.triggers import Trigger, TriggeredSet, count_unchanged, triggered_test_set
from engine.memory import meta_copy, on_meta, parameter_bytes
from engine.runtime import Runtime
from formats.cards import is_compact, read_card
from formats.checkpoints import is_dense, load_strictly
from formats.layouts import BARE, Checkpoint, read_checkpoint
from formats.trigger_file import load_trigger_for
from formats.triggered_folder import load_triggered_folder
from formats.zoo import ZooConfig
from models import ModelConfig
from models.compact import shrink
from models.recognise import Recognised, fits, recognise
from utils.config import Config, InputFile, InputFolder, add_flags, from_flags, given_flags, required, setting
from utils.console import announce
from utils.errors import InputError, quote, shorten
from utils.files import card_path
from utils.machine import check_memory

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class NetworkConfig(Config):
    """The network and what it expects."""

    checkpoint: InputFile = required(
        "the backdoored network: a file, an address, or a name from the zoo (model_zoo.py list)",
        flag="--checkpoint --checkpoints",
        metavar="FILE",
    )
    mean: tuple[float, float, float] | None = setting(
        None,
        "mean with which the network's input is normalised, on the 0..1 scale "
        "(default: the card's, else the toolkit's that wrote the file, else the dataset's)",
        MEANS,
    )
    std: tuple[float, float, float] | None = setting(
        None,
        "standard deviation with which it is normalised, on the 0..1 scale (default: as for --mean)",
        STDS,
    )


@dataclass(frozen=True)
class AttackConfig(Config):
    """What the attack is judged on; not known to a defender."""

    trigger_info: InputFile | None = setting(
        None,
        "the trigger, to report the ASR: a file, an address, or a name from the zoo; without it only clean accuracy is "
        "reported",
        metavar="FILE",
    )
    triggered_images: InputFolder | None = setting(
        None,
        "instead, pictures that have the trigger already: a folder with labels.csv (columns file, target, label), or "
        "BackdoorBench's bd_test_dataset",
        metavar="DIR",
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
        attack: the attacker's trigger, or images that have it already; None where neither is known.
        card: empty where there is none.
        layout: of its file, see ``formats.layouts``.
    """

    path: str
    network: nn.Module
    model: ModelConfig
    dataset: Dataset
    normalization: Normalization
    attack: Trigger | TriggeredSet | None
    card: dict[str, Any]
    layout: str


def add_network_flags(parser: argparse.ArgumentParser, attack: bool = True) -> None:
    """Add the network, its trigger, and what a card may say of them; without ``attack`` no trigger can be given."""
    group = parser.add_argument_group("network")
    add_flags(group, NetworkConfig)
    if attack:
        add_flags(group.add_mutually_exclusive_group(), AttackConfig)
    add_flags(parser.add_argument_group("model"), ModelConfig, card=True)
    add_flags(parser.add_argument_group("data"), DataConfig, card=True)
    add_flags(parser.add_argument_group("zoo"), ZooConfig)


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
    given = given_flags(args, ModelConfig)
    checkpoint, card = read_checkpoint(path, translate="model" not in given), read_card(path)
    compact = is_compact(card or {})
    found = None if compact or "model" in given else recognise(checkpoint.state_dict)
    model = settle_model(path, card or {}, given, found)
    data = _settled(DataConfig, given_flags(args, DataConfig), path, card)
    dataset = load_dataset(data.dataset, data_dir, runtime.device, data.image_size)
    _check_classes(path, card, (found and found.num_classes, checkpoint.num_classes), dataset)
    if found and not fits(checkpoint.state_dict, model.arch, model.widen_factor, dataset.num_classes):
        raise InputError(
            f"{path}: holds {found}, not {model}; leave out --arch and --widen-factor, or look at its card"
        )
    network = build_network(path, checkpoint.state_dict, model, dataset.num_classes, compact)
    try_network(network, model, dataset.test)
    normalization, sources = _normalization(config, card, checkpoint, dataset)
    layout = "" if checkpoint.layout == BARE else f"layout {checkpoint.layout}, "
    how = "from its card" if card else "recognised" if found else "from flags and defaults (no card)"
    announce(
        f"{path}: {layout}{model} ({how}); mean {normalization.mean} ({sources['mean']}), "
        f"std {normalization.std} ({sources['std']})"
    )
    if card is None:
        announce(
            f"{path}: no card, so nothing says whether these are the bytes that its author published{_hint(sources)}"
        )
    attack = _load_attack(from_flags(AttackConfig, args), dataset.test)
    return Loaded(
        path, network.to(runtime.device), model, dataset, normalization, attack, card or {}, checkpoint.layout
    )


def _load_attack(config: AttackConfig, test: ImageSet) -> Trigger | TriggeredSet | None:
    if config.triggered_images:
        return load_triggered_folder(config.triggered_images, test)
    if not config.trigger_info:
        return None
    trigger = load_trigger_for(config.trigger_info, test)
    _check_effect(config.trigger_info, test, trigger)
    return trigger


def _hint(sources: dict[str, str]) -> str:
    """Say which normalisations others use, where nothing but the dataset speaks for the one in force."""
    if set(sources.values()) != {"the dataset's"}:
        return ""
    return (
        ", nor how its input was normalised: many toolkits use --std 0.247 0.243 0.261, "
        "BackdoorBox raw pixels, --mean 0 0 0 --std 1 1 1"
    )


def _agree(path: str, name: str, given: Any, known: Any) -> Any:
    """Return what flag or card says, None where neither speaks.

    Raises:
        InputError: they contradict each other.
    """
    moved = name == "dataset" and given and known and is_same_dataset(given, known)
    if given is not None and known is not None and given != known and not moved:
        flag = "--" + name.replace("_", "-")
        raise InputError(
            f"{flag} {given} contradicts the card of {path}, which says {quote(known)}; leave the flag out"
        )
    return known if given is None else given


def settle_model(
    path: str, card: dict[str, Any], given: dict[str, Any], found: Recognised | None = None
) -> ModelConfig:
    """Return what network a file holds, of which flags and card know something, and names and shapes the rest.

    Args:
        path: the file.
        card: its card; empty where there is none. The code that it names is not run: the user has to name it himself.
        given: values of flags.
        found: what names and shapes say; where they say nothing, defaults do.

    Raises:
        InputError: flag and card contradict each other, or the network is built by code that no flag names.
    """
    if "model" not in given:
        if "model" in card:
            raise InputError(
                f"{path}: its card says that {quote(card['model'])} builds this network; name the file yourself with "
                "--model FILE.py:FUNCTION, since code that a card names is never run"
            )
        known = {"arch": found.arch, "widen_factor": found.widen_factor} if found else {}
        unsaid = {name: value for name, value in known.items() if name not in given and name not in card}
        return _settled(ModelConfig, given, path, card | unsaid)
    others = [f"--{name.replace('_', '-')}" for name in ("arch", "widen_factor") if name in given]
    if others:
        raise InputError(f"--model builds the network itself: leave out {others[0]}")
    if "arch" in card:
        raise InputError(
            f"--model contradicts the card of {path}, which says {quote(card['arch'])}; leave the flag out"
        )
    return ModelConfig(model=given["model"])


def _settled(config: type[C], given: dict[str, Any], path: str, card: dict[str, Any] | None) -> C:
    """Return a config of which flags and card each know some values, and the defaults the rest.

    Raises:
        InputError: flag and card contradict each other, or the card's value is none of the choices here.
    """
    card = card or {}
    values = {name: _agree(path, name, given.get(name), card.get(name)) for name in config.__dataclass_fields__}
    try:
        return config(**{name: value for name, value in values.items() if value is not None})
    except ValueError as error:  # flags were checked when they were parsed
        raise InputError(f"{card_path(path)}: {str(error).removeprefix(config.__name__ + '.')}") from error


def _normalization(
    config: NetworkConfig, card: dict[str, Any] | None, checkpoint: Checkpoint, dataset: Dataset
) -> tuple[Normalization, dict[str, str]]:
    """Return what flag, card, layout or dataset say, in this order, and which of them said it."""
    known = {name: tuple(value) for name, value in (card or {}).get("normalization", {}).items()}
    usual = checkpoint.normalization(dataset.name)
    parts, sources = {}, {}
    for name in ("mean", "std"):
        said = _agree(config.checkpoint, name, getattr(config, name), known.get(name))
        parts[name] = said or getattr(usual or dataset.normalization, name)
        if said:
            sources[name] = "from its card" if known.get(name) else f"from --{name}"
        else:
            sources[name] = f"{checkpoint.layout}'s" if usual else "the dataset's"
    return Normalization(**parts), sources


def sketch_of(model: ModelConfig, num_classes: int) -> nn.Module:
    """Return a network to count with: on the meta device, but for the user's own, which are built.

    Raises:
        InputError: as ``models.own.build_own``.
    """
    build = partial(model.build, num_classes)
    return build() if model.model else on_meta(build)


def try_network(network: nn.Module, model: ModelConfig, images: ImageSet) -> None:
    """Make sure that a network takes images of this size and tells their classes apart.

    Args:
        network: on the CPU or the meta device.
        model: what it is.
        images: such as it will see.

    Raises:
        InputError: it does not.
    """
    what = f"--model {model}" if model.model else f"--arch {model.arch}"
    height, width = images.images.shape[1:3]
    wanted = (2, images.num_classes)
    try:
        with torch.inference_mode():
            # own code may need content
            tried, place = (copy.deepcopy(network), "cpu") if model.model else (meta_copy(network), "meta")
            logits = tried.eval()(torch.zeros(2, 3, height, width, device=place))
    except Exception as error:  # the user's own code, which may fail in any way
        reason = shorten(str(error).partition("\n")[0])
        raise InputError(
            f"{what}: the network fails on images of {height}x{width}: {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != wanted or not logits.is_floating_point():
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"{what}: the network makes {found} of two images, expected logits {wanted}")


def build_network(
    path: str, state_dict: dict[str, Tensor], model: ModelConfig, num_classes: int, compact: bool = False
) -> nn.Module:
    """Build a network on the CPU, in eval mode, and load its weights.

    Args:
        path: named in the errors.
        state_dict: its weights.
        model: what it is.
        num_classes: number of outputs.
        compact: whether channels were dropped, which the shapes of the weights then say.

    Raises:
        InputError: it cannot be built here, is too large for the memory, or the weights do not fit.
    """
    advice = "look at --widen-factor or the card"
    check_memory(parameter_bytes(sketch_of(model, num_classes)), f"{path}: {model}", advice, torch.device("cpu"))
    network = model.build(num_classes)
    if compact:
        shrink(network.eval(), {name: tensor.shape for name, tensor in state_dict.items() if is_dense(tensor)})
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


def _check_classes(path: str, card: dict[str, Any] | None, said: tuple[int | None, ...], dataset: Dataset) -> None:
    known, found = card or {}, dataset.describe()
    for classes in (known.get("num_classes"), *said):
        if classes not in (None, dataset.num_classes):
            raise InputError(f"{path}: {classes} classes, but {dataset.name} has {dataset.num_classes}; see --dataset")
    if "classes" in found and known.get("classes", found["classes"]) != found["classes"]:
        raise InputError(f"{path}: its card names other classes than those of {dataset.name}")
    if "dataset_sha256" in found and known.get("dataset_sha256", dataset.sha256) != dataset.sha256:
        announce(
            f"warning: {path}: {dataset.name} holds other images than when it was trained, so the defender's may be "
            "among those it was trained on"
        )
