"""Which network a state_dict belongs to, from names and shapes alone."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from models.registry import ARCHITECTURES, ModelConfig, build_model
from models.width import widen

HEADS = ("linear", "classifier")  # the last layer of each network of the registry


class Recognised(NamedTuple):
    """Architecture, width and number of classes."""

    arch: str
    widen_factor: float
    num_classes: int

    def __str__(self) -> str:
        return f"{self.arch}, width {self.widen_factor}, {self.num_classes} classes"


@lru_cache
def _shapes(arch: str, widen_factor: float) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network with one class, which is not built."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build_model(arch, 1, widen_factor).state_dict().items()}


def _without_shortcuts(names: set[str]) -> set[str]:
    return {name for name in names if ".shortcut." not in str(name)}  # whether there is one depends on the width


def _widths(features: int, published: int) -> Iterator[float]:
    """Return widen factors that make ``features`` of ``published`` channels, those that people choose first."""
    exact = features / published
    limits = ModelConfig.__dataclass_fields__["widen_factor"].metadata["within"]
    for width in (round(exact, 1), round(exact, 2), round(64 * exact) / 64, round(exact, 3), round(exact, 4), exact):
        if width in limits and widen(published, width) == features:
            yield width


def fits(state_dict: dict[str, Tensor], arch: str, widen_factor: float, num_classes: int) -> bool:
    """Say whether names and shapes of a state_dict are those of a network of the registry."""
    if arch not in ARCHITECTURES or any(tensor.is_nested for tensor in state_dict.values()):  # these have no shape
        return False
    expected = {
        name: (num_classes, *shape[1:]) if name.rpartition(".")[0] in HEADS else shape
        for name, shape in _shapes(arch, widen_factor).items()
    }
    return expected == {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def recognise(state_dict: dict[str, Tensor]) -> Recognised | None:
    """Return what network of the registry has these names and shapes; None if none has.

    Args:
        state_dict: by names as they are here.
    """
    heads = [state_dict[f"{name}.weight"] for name in HEADS if f"{name}.weight" in state_dict]
    if len(heads) != 1 or heads[0].is_nested or heads[0].dim() != 2:
        return None
    classes, features = heads[0].shape
    names = _without_shortcuts(set(state_dict))
    for arch in ARCHITECTURES:
        shapes = _shapes(arch, 1.0)
        if names != _without_shortcuts(set(shapes)):
            continue
        published = next(shape[1] for name, shape in shapes.items() if name.removesuffix(".weight") in HEADS)
        expansion = _expansion(shapes)
        if features % expansion:
            continue
        for width in _widths(features // expansion, published // expansion):
            if fits(state_dict, arch, width, classes):
                return Recognised(arch, width, classes)
    return None


def _expansion(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return how many outputs the last block has for each channel that is widened."""
    if "layer4.0.conv3.weight" not in shapes:
        return 1
    out, channels = shapes["layer4.0.conv3.weight"][:2]
    return out // channels
