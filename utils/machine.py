"""What the machine leaves to this process: CPUs and memory, within the limits of a container and beside others."""

import math
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.errors import InputError


@dataclass(frozen=True)
class Cpus:
    """CPUs of the machine.

    Attributes:
        allowed: number of those on which the process may run.
        limit: as many at once as its control groups grant; infinite where they do not say.
        busy: as many of the allowed ones as other processes use now; None where nobody looked.
    """

    allowed: int
    limit: float = math.inf
    busy: float | None = None

    @property
    def free(self) -> int:
        """How many are left, at least 1."""
        return max(1, int(min(self.limit, round(self.allowed - (self.busy or 0)))))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not there, as outside Linux, or not for us: nothing is known
        return ""


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of the process's control groups and of all above them, versions 1 and 2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            mount, parts = root / "sys/fs/cgroup" / (controller if controllers else ""), path.strip("/").split("/")
            yield from (mount.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


def allowed_cpus() -> set[int]:
    """Return the numbers of the CPUs on which this process may run."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _ticks(root: Path, cpus: set[int]) -> tuple[int, int]:
    """Return how long these CPUs were busy and how long they have been counted, in ticks."""
    rows = [line.split() for line in _read(root / "proc/stat").splitlines()]
    times = [list(map(int, row[1:9])) for row in rows if row and row[0] in {f"cpu{number}" for number in cpus}]
    return sum(sum(row) - row[3] - row[4] for row in times), sum(map(sum, times))  # idle, and waiting for a disk


def find_cpus(root: Path = Path("/"), seconds: float = 0.2) -> Cpus:
    """Look what CPUs there are and, for some seconds, how busy other processes keep them."""
    cpus, limits = allowed_cpus(), [math.inf]
    for group in _groups(root, "cpu"):
        quota = [_read(group / name) for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
        match " ".join(quota).split():
            case [share, period] if share.isdigit():  # others are "max" and -1
                limits.append(int(share) / int(period))
    before = _ticks(root, cpus)
    time.sleep(seconds)
    busy, counted = (now - then for now, then in zip(_ticks(root, cpus), before, strict=True))
    return Cpus(len(cpus), min(limits), len(cpus) * busy / counted if counted else 0.0)


def _number(path: Path, word: str = "") -> int | None:
    """Return the number in a file, or the one that follows a word; None where there is none."""
    found = re.search(rf"^{word}\s*(\d+)", _read(path), re.MULTILINE)
    return int(found[1]) if found else None


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that can still be used, by the machine and by every control group; None where unknown.

    What a control group keeps of files it has not used lately counts as free: it gives that up when asked.
    """
    available = _number(root / "proc/meminfo", "MemAvailable:")  # kB
    free = [] if available is None else [1024 * available]
    for group in _groups(root, "memory"):
        for limit, use, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            if (most := _number(group / limit)) is not None:
                used = (_number(group / use) or 0) - (_number(group / "memory.stat", cached) or 0)
                free.append(max(0, most - max(0, used)))
    return min(free, default=None)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"


def check_memory(needed: int, what: str, advice: str, device: torch.device) -> None:
    """Refuse what is larger than the memory that is free now; where that is not known, nothing is refused.

    Args:
        needed: bytes.
        what: what needs them, the beginning of the message.
        advice: what to do instead, its end.
        device: whose memory.

    Raises:
        InputError: fewer bytes are free.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if free is not None and needed > free:
        raise InputError(f"{what} needs about {_gigabytes(needed)}, {_gigabytes(free)} are free; {advice}")


def as_one_line(error: BaseException) -> str | None:
    """Return what to tell the user about an error that means that memory ran out, None for any other error."""
    text = str(error)
    on_cpu = isinstance(error, RuntimeError) and re.search(
        "DefaultCPUAllocator: (can't allocate|not enough) memory", text
    )
    if not (on_cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError))):
        return None
    tried = re.search(r"tried to allocate [\d.]+ \w+", text, re.IGNORECASE)
    return f"out of memory{f' ({tried[0].lower()})' if tried else ''}; smaller batches or a narrower network need less"
