"""Device, precision and threads of a run."""

import argparse
import os
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from utils.config import Config, Range, setting
from utils.errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def device_name(text: str) -> str:
    """An argparse type: auto, cpu, cuda or cuda:N.

    Raises:
        argparse.ArgumentTypeError: the text is anything else.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N")
    return text


@dataclass(frozen=True)
class RuntimeConfig(Config):
    """How to compute."""

    device: str = setting("auto", "auto (CUDA if there is one), cpu, cuda or cuda:N", kind=device_name)
    precision: str = setting(
        "auto", "auto takes bf16 if the hardware computes in it natively, else fp32", choices=("auto", *PRECISIONS)
    )
    threads: int | None = setting(None, "CPU threads; all cores if not given", Range(1, 1024))


@dataclass(frozen=True)
class Runtime:
    """Where and in which data type the networks run."""

    device: torch.device
    precision: torch.dtype

    def facts(self) -> dict[str, Any]:
        """Return what a resumed run has to share with its beginning."""
        return {"device": str(self.device), "precision": str(self.precision), "threads": torch.get_num_threads()}


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """Compute convolutions and linear layers in ``precision``, bfloat16 or float32, in the block."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def has_bfloat16(device: torch.device) -> bool:
    """Say whether the hardware itself computes in bfloat16 (AVX512-BF16 or AMX; CUDA from compute capability 8)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        flags = set(Path("/proc/cpuinfo").read_text(errors="replace").split())
    except FileNotFoundError:  # not Linux
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def prepare_runtime(config: RuntimeConfig) -> Runtime:
    """Choose device and data type, and make repeated runs give the same bits.

    Raises:
        InputError: the device does not exist.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if config.threads:
        torch.set_num_threads(config.threads)
    if device.type == "cuda":
        device = _prepare_cuda(device)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if has_bfloat16(device) else "fp32"
    return Runtime(device, PRECISIONS[precision])


def _prepare_cuda(device: torch.device) -> torch.device:
    """Set CUDA up and return the device with its number: plain ``cuda`` is the first."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its results only with this
    device = torch.device("cuda", device.index or 0)
    if device.index >= torch.cuda.device_count():
        raise InputError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices; try --device cpu")
    torch.cuda.set_device(device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    return device
