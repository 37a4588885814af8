"""``trigger_info.th``: how a trigger goes from the attacker's step to the evaluation of the others."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.errors import InputError
from data.triggers import MODES, Trigger
from utils.files import load_torch, save_torch

KEYS = ("trigger_pattern", "trigger_mask", "trigger_alpha", "poison_target", "data_index")
MODE = "trigger_mode"  # ours, and only in files of triggers that are added; the release's all blend


def save_trigger(path: str | Path, trigger: Trigger) -> None:
    """Write a trigger as tensors; raises ``OSError`` where the file cannot be written."""
    parts = (trigger.pattern, trigger.mask, float(trigger.alpha), trigger.target, trigger.data_index)
    mode = {} if trigger.mode == MODES[0] else {MODE: trigger.mode}
    save_torch(path, {**dict(zip(KEYS, parts, strict=True)), **mode})


def _numbers(content: dict, key: str, path: str | Path) -> Tensor:
    """Return an entry as dense float64, whatever it was stored as."""
    value = content[key]
    try:
        value = value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value, dtype=np.float64))
        if value.is_complex() or value.is_meta or value.is_quantized or value.layout != torch.strided:
            raise TypeError(f"{value.layout} {value.dtype}")
        value = value.double()
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {key} is no array of numbers") from error
    if not torch.isfinite(value).all():
        raise InputError(f"{path}: {key} holds NaN or infinite values")
    return value


def _whole(values: Tensor, key: str, path: str | Path) -> Tensor:
    if not torch.equal(values, values.round()):
        raise InputError(f"{path}: {key} holds values that are not whole numbers (pixels are 0..255)")
    return values


def _in_range(values: Tensor, low: float, high: float, key: str, path: str | Path) -> Tensor:
    if values.numel() and not (low <= values.min() and values.max() <= high):
        raise InputError(f"{path}: {key} reaches from {values.min()} to {values.max()}, expected {low} to {high}")
    return values


def load_trigger(path: str | Path, num_classes: int) -> Trigger:
    """Read a trigger file, the ANP release's NumPy pickles included, without running anything in it.

    Args:
        path: the file.
        num_classes: bound of the target class.

    Raises:
        InputError: the file is missing, damaged or hostile, an entry is missing, of the wrong shape or out of range.
    """
    content = load_torch(path)
    if not isinstance(content, dict) or any(key not in content for key in KEYS[:4]):
        raise InputError(f"{path}: not a trigger file; expected a dict with {', '.join(KEYS)}")
    pattern, mask, alpha, target = (_numbers(content, key, path) for key in KEYS[:4])
    known = content.get("data_index") is not None
    index = _numbers(content, "data_index", path) if known else torch.zeros(0)
    if pattern.dim() != 4 or mask.dim() != 4 or pattern.shape[:3] != mask.shape[:3] or mask.shape[3] != 1:
        raise InputError(
            f"{path}: trigger_pattern {tuple(pattern.shape)} and trigger_mask {tuple(mask.shape)}, "
            "expected (N, H, W, C) and (N, H, W, 1)"
        )
    if alpha.numel() != 1 or not target.numel():
        raise InputError(f"{path}: expected one trigger_alpha and at least one poison_target")
    mode = content.get(MODE, MODES[0])
    if not isinstance(mode, str) or mode not in MODES:
        raise InputError(f"{path}: {MODE} is {mode!r}, expected {' or '.join(MODES)}")
    if mode == "add":
        pattern = _in_range(pattern, -255, 255, "trigger_pattern", path).float()
    else:
        pattern = _whole(_in_range(pattern, 0, 255, "trigger_pattern", path), "trigger_pattern", path).to(torch.uint8)
    return Trigger(
        pattern,
        _in_range(mask, 0, 1, "trigger_mask", path),
        float(_in_range(alpha, 0, 1, "trigger_alpha", path)),
        _whole(_in_range(target, 0, num_classes - 1, "poison_target", path), "poison_target", path).reshape(-1).long(),
        _in_range(index, 0, 2**31, "data_index", path).reshape(-1).long(),
        mode,
    )
