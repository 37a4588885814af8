"""Weights into networks: checked to the last key, never partly loaded."""

from pathlib import Path

import torch
from torch import Tensor, nn

from formats.layouts import read_checkpoint
from utils.errors import InputError, shorten


def _listing(what: str, names: list[str]) -> str:
    shown = ", ".join(map(shorten, names[:3]))
    return f"{len(names)} {what} ({shown}{', ...' if len(names) > 3 else ''})" if names else ""


def load_strictly(network: nn.Module, state_dict: dict[str, Tensor], path: str | Path) -> None:
    """Load every tensor of the network from a state_dict; nothing is loaded unless all fits.

    Args:
        network: changed in place.
        state_dict: by the names of the network.
        path: named in the errors.

    Raises:
        InputError: keys are missing, unexpected, differently shaped or of another kind, or a value is not finite.
    """
    own = network.state_dict()
    for name, tensor in state_dict.items():
        if not is_dense(tensor):
            raise InputError(f"{path}: {shorten(str(name))} is no dense tensor ({tensor.layout} {tensor.dtype})")
    missing = [name for name in own if name not in state_dict]
    unexpected = [str(name) for name in state_dict if name not in own]
    shapes = [
        f"{name} {tuple(state_dict[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state_dict and state_dict[name].shape != own[name].shape
    ]
    faults = [_listing("missing", missing), _listing("unexpected", unexpected), _listing("of another shape", shapes)]
    if any(faults):
        raise InputError(
            f"{path}: does not fit this network: {'; '.join(filter(None, faults))}; "
            "check --arch, --widen-factor and the number of classes, or build the network yourself (--model)"
        )
    for name, tensor in state_dict.items():
        _check_values(name, tensor, own[name], path)
    network.load_state_dict(state_dict)


def is_dense(tensor: Tensor) -> bool:
    """Say whether a tensor is one of plain numbers in memory: not sparse, nested, quantized or without values."""
    odd = tensor.is_nested or tensor.is_meta or tensor.is_quantized or tensor.is_complex()
    return tensor.layout == torch.strided and not odd


def _check_values(name: str, tensor: Tensor, own: Tensor, path: str | Path) -> None:
    if tensor.is_floating_point() != own.is_floating_point():
        raise InputError(f"{path}: {name} is a {tensor.dtype} tensor, expected {own.dtype}")
    tensor = tensor.to(own.dtype)
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise InputError(f"{path}: {name} holds {bad} values that are NaN or infinite")
    if name.rpartition(".")[2] == "running_var" and bool((tensor < 0).any()):
        raise InputError(f"{path}: {name} holds negative variances; the file was not saved by a training")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a file, whoever wrote it; raises as ``read_checkpoint``."""
    return read_checkpoint(path).state_dict
