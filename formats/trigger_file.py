"""``trigger_info.th``: how a trigger goes from the attacker's step to the evaluation of the others."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.datasets import ImageSet
from data.triggers import MODES, Trigger
from formats.checkpoints import is_dense
from formats.generators_file import draw_from, is_generators
from utils.errors import InputError, quote, shorten
from utils.files import load_torch, save_torch

KEYS = ("trigger_pattern", "trigger_mask", "trigger_alpha", "poison_target", "data_index")
ORDERED = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)
LARGEST = {"trigger_pattern": 2**28, "trigger_mask": 2**28, "data_index": 2**24}  # numbers; others have 1 an image
ENTRIES = 2**20
MODE = "trigger_mode"  # ours, and only in files of triggers that are added; the release's all blend


def save_trigger(path: str | Path, trigger: Trigger, data_index: Tensor) -> None:
    """Write a trigger as tensors.

    Args:
        path: the file.
        trigger: with targets.
        data_index: int64; the poisoned ones among the dataset's training images.

    Raises:
        OSError: the file cannot be written.
    """
    parts = (trigger.pattern, trigger.mask, float(trigger.alpha), trigger.target, data_index)
    mode = {} if trigger.mode == MODES[0] else {MODE: trigger.mode}
    save_torch(path, {**dict(zip(KEYS, parts, strict=True)), **mode})


def _numbers(content: dict, key: str, path: str | Path, low: float, high: float) -> Tensor:
    """Return an entry as a dense array of finite numbers in a range, in the data type in which it was stored."""
    value = content[key]
    try:
        value = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
        if not is_dense(value):
            raise TypeError(f"{value.layout} {value.dtype}")
        if value.numel() > LARGEST.get(key, ENTRIES):
            raise ValueError(f"{value.numel()} numbers")
        value = value if value.dtype in ORDERED else value.double()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = shorten(str(error).partition("\n")[0])
        raise InputError(f"{path}: {key} is no array of numbers ({reason})") from error
    if value.numel():
        smallest, largest = (float(bound) for bound in value.aminmax())  # NaN if any is
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            raise InputError(f"{path}: {key} holds NaN or infinite values")
        if smallest < low or largest > high:
            raise InputError(f"{path}: {key} reaches from {smallest} to {largest}, expected {low} to {high}")
    return value


def _whole(values: Tensor, dtype: torch.dtype, key: str, path: str | Path) -> Tensor:
    whole = values.to(dtype)
    if values.is_floating_point() and not torch.equal(values, whole.to(values.dtype)):
        raise InputError(f"{path}: {key} holds values that are not whole numbers (pixels are 0..255)")
    return whole


def load_trigger_for(path: str | Path, images: ImageSet) -> Trigger:
    """Read a trigger file, or draw from the generators of an input-aware attack.

    Args:
        path: ``trigger_info.th`` or ``generators.th``.
        images: the clean test images.

    Raises:
        InputError: as ``load_trigger`` and ``draw_from``.
    """
    content = load_torch(path)
    return draw_from(path, content, images) if is_generators(content) else _stored(path, content, images.num_classes)


def load_trigger(path: str | Path, num_classes: int) -> Trigger:
    """Read a trigger file, the ANP release's NumPy pickles included, without running anything in it.

    Args:
        path: the file.
        num_classes: bound of the target class.

    Raises:
        InputError: the file is missing, damaged or hostile, an entry is missing, of the wrong shape or out of range.
    """
    return _stored(path, load_torch(path), num_classes)


def _stored(path: str | Path, content: Any, num_classes: int) -> Trigger:
    if not isinstance(content, dict) or any(key not in content for key in KEYS[:4]):
        raise InputError(f"{path}: not a trigger file; expected a dict with {', '.join(KEYS)}")
    mode = content.get(MODE, MODES[0])
    if not isinstance(mode, str) or mode not in MODES:
        raise InputError(f"{path}: {MODE} is {quote(mode)}, expected {' or '.join(MODES)}")
    highest = {"trigger_pattern": 255, "trigger_mask": 1, "trigger_alpha": 1, "poison_target": num_classes - 1}
    lowest = {"trigger_pattern": -255} if mode == "add" else {}
    pattern, mask, alpha, target = (
        _numbers(content, key, path, lowest.get(key, 0), high) for key, high in highest.items()
    )
    if content.get("data_index") is not None:
        _numbers(content, "data_index", path, 0, 2**31)
    if pattern.dim() != 4 or mask.dim() != 4 or pattern.shape[:3] != mask.shape[:3] or mask.shape[3] != 1:
        raise InputError(
            f"{path}: trigger_pattern {tuple(pattern.shape)} and trigger_mask {tuple(mask.shape)}, "
            "expected (N, H, W, C) and (N, H, W, 1)"
        )
    if alpha.numel() != 1 or not target.numel():
        raise InputError(f"{path}: expected one trigger_alpha and at least one poison_target")
    if not alpha.any() or not mask.any():
        raise InputError(f"{path}: trigger_{'mask' if alpha.any() else 'alpha'} is 0: it would change no image")
    return Trigger(
        pattern.float() if mode == "add" else _whole(pattern, torch.uint8, "trigger_pattern", path),
        mask if mask.is_floating_point() else mask.double(),
        float(alpha),
        _whole(target, torch.int64, "poison_target", path).reshape(-1),
        mode,
    )
