"""Device, precision and threads of a run."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from data.errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Runtime:
    """Where and in which data type the networks run."""

    device: torch.device
    precision: torch.dtype


def has_bfloat16(device: torch.device) -> bool:
    """Say whether the hardware itself computes in bfloat16 (AVX512-BF16 or AMX; CUDA from compute capability 8)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        flags = set(Path("/proc/cpuinfo").read_text(errors="replace").split())
    except FileNotFoundError:  # not Linux
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def prepare_runtime(device: str, precision: str, threads: int | None) -> Runtime:
    """Choose device and data type, and make repeated runs give the same bits.

    Args:
        device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``auto`` (bf16 where the hardware has it), ``fp32`` or ``bf16``.
        threads: CPU threads, at least 1; None leaves PyTorch's choice.

    Raises:
        InputError: the device does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if threads:
        torch.set_num_threads(threads)
    if chosen.type == "cuda":
        _prepare_cuda(chosen)
    if precision == "auto":
        precision = "bf16" if has_bfloat16(chosen) else "fp32"
    return Runtime(chosen, PRECISIONS[precision])


def _prepare_cuda(device: torch.device) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its results only with this
    if (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices; try --device cpu")
    torch.cuda.set_device(device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
