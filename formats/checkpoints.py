"""Networks from files: unwrapped, checked to the last key, never partly loaded."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import InputError
from utils.files import load_torch

WRAPPERS = ("state_dict", "model", "net", "netC", "model_state", "model_state_dict")
PREFIXES = ("module.", "model.", "net.")


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def unwrap(content: Any, path: str | Path) -> dict[str, Tensor]:
    """Find the state_dict in what a checkpoint holds and strip one prefix common to all keys.

    Args:
        content: what ``load_torch`` returned.
        path: named in the error.

    Raises:
        InputError: there is no state_dict in it.
    """
    for _ in range(2):
        if _is_state_dict(content) or not isinstance(content, dict):
            break
        content = next((content[key] for key in WRAPPERS if key in content), content)
    if not _is_state_dict(content):
        raise InputError(f"{path}: holds no state_dict; expected tensors by name, bare or under {', '.join(WRAPPERS)}")
    for prefix in PREFIXES:
        if all(str(name).startswith(prefix) for name in content):
            return {name.removeprefix(prefix): tensor for name, tensor in content.items()}
    return content


def _listing(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def load_strictly(network: nn.Module, state_dict: dict[str, Tensor], path: str | Path) -> None:
    """Load every tensor of the network from a state_dict; nothing is loaded unless all fits.

    Args:
        network: changed in place.
        state_dict: as ``unwrap`` returned it.
        path: named in the errors.

    Raises:
        InputError: keys are missing, unexpected, differently shaped or of another kind, or a value is not finite.
    """
    own = network.state_dict()
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
            "check --arch, --widen-factor and the number of classes"
        )
    for name, tensor in state_dict.items():
        if (
            tensor.layout != torch.strided
            or tensor.is_meta
            or tensor.is_quantized
            or (tensor.is_floating_point() != own[name].is_floating_point() or tensor.is_complex())
        ):
            raise InputError(f"{path}: {name} is a {tensor.layout} {tensor.dtype} tensor, expected {own[name].dtype}")
        bad = int((~torch.isfinite(tensor.to(own[name].dtype))).sum())
        if bad:
            raise InputError(f"{path}: {name} holds {bad} values that are NaN or infinite")
    network.load_state_dict(state_dict)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint safely and unwrap it; raises as ``load_torch`` and ``unwrap``."""
    return unwrap(load_torch(path), path)
