"""Device, precision and threads of a run."""

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
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if threads:
        torch.set_num_threads(threads)
    if chosen.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    if precision == "auto":
        precision = "bf16" if has_bfloat16(chosen) else "fp32"
    return Runtime(chosen, PRECISIONS[precision])
