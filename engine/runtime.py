"""Device, precision and threads of a run."""

import argparse
import os
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from utils.config import Config, Range, setting
from utils.console import announce
from utils.errors import InputError, quote
from utils.machine import Cpus, allowed_cpus, find_cpus
from utils.run import Run, read_as_state

DEVICES = r"auto|cpu|cuda(:\d{1,2})?"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
PYTORCH_THREADS = torch.get_num_threads()  # what it would take: OMP_NUM_THREADS, or one thread a core


def device_name(text: str) -> str:
    """An argparse type: auto, cpu, cuda or cuda:N.

    Raises:
        argparse.ArgumentTypeError: the text is anything else.
    """
    if not re.fullmatch(DEVICES, text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N")
    return text


@dataclass(frozen=True)
class RuntimeConfig(Config):
    """How to compute."""

    device: str = setting("auto", "auto (CUDA if there is one), cpu, cuda or cuda:N", kind=device_name)
    precision: str = setting(
        "auto", "auto takes bf16 if the hardware is faster in it, else fp32", choices=("auto", *PRECISIONS)
    )
    threads: int | None = setting(None, "CPU threads; if not given, as many as others leave free", Range(1, 1024))


@dataclass(frozen=True)
class Runtime:
    """Where and in which data type the networks run, with how many CPU threads of how many CPUs."""

    device: torch.device
    precision: torch.dtype
    threads: int = field(default_factory=torch.get_num_threads)
    cpus: Cpus = field(default_factory=lambda: Cpus(len(allowed_cpus())))

    def facts(self) -> dict[str, Any]:
        """Return what a resumed run has to share with its beginning."""
        return {"device": str(self.device), "precision": str(self.precision), "threads": self.threads}

    def __str__(self) -> str:
        allowed = self.cpus.allowed
        text = (
            f"{self.device}, {_flag_of(self.precision)}, {_count(self.threads, 'thread')} on {_count(allowed, 'CPU')}"
        )
        if self.cpus.busy is None or self.threads >= allowed:  # nothing was chosen, or nothing could be added
            return text
        reasons = [f"others use {self.cpus.busy:.1f}"] if self.cpus.busy >= 0.05 else []
        reasons += [f"{self.cpus.limit:.1f} are granted"] if self.cpus.limit < allowed else []
        return f"{text} ({', '.join([*reasons, '--threads changes it'])})"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _flag_of(precision: torch.dtype | str) -> str:
    """Return what ``--precision`` calls a data type, itself or its name as in ``Runtime.facts``."""
    return {str(dtype): name for name, dtype in PRECISIONS.items()}.get(str(precision), str(precision))


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """Compute convolutions and linear layers in ``precision``, bfloat16 or float32, in the block."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def gains_from_bfloat16(device: torch.device, cpuinfo: str | Path = "/proc/cpuinfo") -> bool:
    """Say whether the hardware computes faster in bfloat16 than in float32.

    CPUs with AMX and AMD's with AVX512-BF16 were faster when measured, Intel's with AVX512-BF16 but without AMX slower
    (docs/speed.md). Not measured, but taken to be faster: ARM's with such instructions, CUDA from compute capability 8.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        words = set(Path(cpuinfo).read_text(errors="replace").split())
    except FileNotFoundError:  # not Linux
        return False
    return bool(words & {"amx_bf16", "bf16"}) or {"avx512_bf16", "AuthenticAMD"} <= words


def prepare_runtime(config: RuntimeConfig, began_with: dict[str, Any] | None = None) -> Runtime:
    """Choose device, data type and threads, and make repeated runs give the same bits.

    Args:
        config: what the user asked for.
        began_with: the ``Runtime.facts`` of the run to resume; they hold where the user asked for nothing.

    Raises:
        InputError: the device does not exist, or what the user asked for is not what the run to resume began with.
    """
    config = _continued(config, began_with or {})
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    cpus = Cpus(len(allowed_cpus())) if config.threads else find_cpus()
    threads = config.threads or min(cpus.free, PYTORCH_THREADS)
    torch.set_num_threads(threads)
    if device.type == "cuda":
        device = _prepare_cuda(device, bool(began_with))
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if gains_from_bfloat16(device) else "fp32"
    return Runtime(device, PRECISIONS[precision], threads, cpus)


def choose_runtime(config: RuntimeConfig, run: Run) -> Runtime:
    """Choose how a run computes, or goes on to compute, say so, and let the run remember it.

    Raises:
        InputError: as ``prepare_runtime``.
    """
    with read_as_state(run.state_path):
        _continued(config, run.began_with or {})
    runtime = prepare_runtime(config, run.began_with)
    run.rely_on(runtime.facts())
    announce(f"computing on {runtime}")
    return runtime


def _continued(config: RuntimeConfig, facts: dict[str, Any]) -> RuntimeConfig:
    """Fill in what a run began with where the user asked for nothing.

    Raises:
        InputError: the user asked for something else.
        ValueError, TypeError: what it began with means nothing.
    """
    before = {name: facts[name] for name in ("device", "precision", "threads") if name in facts}
    if "precision" in before:
        before["precision"] = _flag_of(before["precision"])
    if not re.fullmatch(DEVICES, before.get("device", "cpu")):
        raise ValueError(f"device {quote(before['device'])}")
    for name, old in before.items():
        given = getattr(config, name)
        if given not in (None, "auto", old) and (given, old) != ("cuda", "cuda:0"):
            raise InputError(
                f"--{name} is {given} but was {old} in the run to resume; leave it out to go on with {old}, "
                "or --overwrite to start again"
            )
    return replace(config, **before)


def _prepare_cuda(device: torch.device, resuming: bool) -> torch.device:
    """Set CUDA up and return the device with its number: plain ``cuda`` is the first."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats its results only with this
    device, count = torch.device("cuda", device.index or 0), torch.cuda.device_count()
    if device.index >= count:
        advice = "--overwrite starts again on another device" if resuming else "try --device cpu"
        raise InputError(f"--device {device}: there are {count} CUDA devices; {advice}")
    torch.cuda.set_device(device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    return device
