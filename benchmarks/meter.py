"""How long work takes, what the machine reaches at best, and how much of the work is convolution or matrix product."""

import os
import re
import time
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

STRETCHES = 4  # of calls, of which the best counts
CALLS = {"cpu": 12, "cuda": 200}  # in a stretch; a call takes a GPU a fraction of a millisecond
# Images of a call. On a CPU few, or a fast one spends its time on pages: the C library gives outputs of 32 MB and more
# back to the system after every call.
IMAGES = {"cpu": 16, "cuda": 64}
BUSY = 1.1  # ratio of two measurements of the same peak above which something else was computing
OTHERS = 0.2  # CPUs that others may use
# Operators on a CPU, kernels on a GPU. convertTensor and upsample_bilinear are neither.
MIXING = re.compile(
    r"conv(?!ert)|mkldnn_|aten::(linear|matmul|(b|add|badd)?mm)$|gemm|gemv|scudnn|xmma|cutlass|nvjet|splitK"
    r"|fprop|dgrad|wgrad|winograd"
)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long a function takes; on CUDA between two events, of which the second waits for all kernels."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record()
    work()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1000


def peak_flops(device: torch.device, precision: torch.dtype, channels: int = 256) -> float:
    """Return the FLOP/s of a large convolution: the best of several stretches of calls.

    Args:
        device: cpu or cuda.
        precision: data type of weights and images.
        channels: of the images, 32x32 each.
    """
    batch, calls = IMAGES[device.type], CALLS[device.type]
    layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    layer = layer.to(device, precision, memory_format=torch.channels_last)
    images = torch.randn(batch, channels, 32, 32, device=device, dtype=precision)
    images = images.contiguous(memory_format=torch.channels_last)

    def stretch(count: int) -> None:
        for _ in range(count):
            layer(images)

    with torch.inference_mode():
        stretch(1 if device.type == "cpu" else calls)  # a GPU raises its clock meanwhile
        best = min(seconds(lambda: stretch(calls), device) for _ in range(STRETCHES))
    return calls * 2 * batch * 32 * 32 * channels * channels * 9 / best


def signs_of_others(before: dict[str, float], after: dict[str, float], used: Iterable[float | None]) -> list[str]:
    """Return what shows that others were computing on this machine meanwhile.

    Args:
        before, after: two measurements of each peak, which may differ by 10 %.
        used: how many CPUs others used when somebody looked, None where that is not known.
    """
    changed = [name for name in before if max(before[name], after[name]) > BUSY * min(before[name], after[name])]
    signs = [f"its peak in {' and '.join(changed)} changed by more than 10 %"] if changed else []
    most = max((count for count in used if count is not None), default=0.0)
    return [*signs, f"others used {most:.1f} CPUs"] if most > OTHERS else signs


def profiled(work: Callable[[], object], device: torch.device) -> EventList:
    """Run a function under the profiler, which slows it down; returns its operators and, on CUDA, its kernels."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else its progress goes to stderr
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *cuda]) as profiler:
        work()
        if cuda:
            torch.cuda.synchronize(device)
    return profiler.key_averages()


def split_time(events: Iterable[FunctionEventAvg], device: torch.device) -> tuple[float, float]:
    """Return the time in convolutions and matrix products, and in everything else.

    On a CPU these are the operators' own times, Python between them left out. On CUDA they are the kernels' times,
    which a replayed CUDA graph has, too; that the GPU waits is left out.

    Args:
        events: of ``profiled``.
        device: of the same run.

    Returns:
        Microseconds.
    """
    parts = [0.0, 0.0]
    for event in events:
        if device.type != "cuda":
            time = event.self_cpu_time_total
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            time = event.self_device_time_total
        else:
            continue
        parts[0 if MIXING.search(event.key) else 1] += time
    return tuple(parts)


def costliest(events: EventList, device: torch.device, count: int = 10) -> str:
    """Return the profiler's table of the operators that take most time themselves."""
    kind = "device" if device.type == "cuda" else "cpu"
    return events.table(sort_by=f"self_{kind}_time_total", row_limit=count)
