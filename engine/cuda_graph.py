"""Record the kernels of one iteration once and replay them: on a GPU such loops are bound by launches."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
WARM_UP = 3  # runs before the recording, in which libraries choose kernels and allocate workspaces


class Recorder(Protocol):
    """What runs work, records its operations and repeats them on the same memory."""

    def warm_up(self, work: Callable[[], Any]) -> None:
        """Run the work without recording."""

    def record(self, work: Callable[[], Tensors]) -> Tensors:
        """Record the work; returns its results, which every replay writes anew."""

    def replay(self) -> None:
        """Repeat the recorded operations."""


class CudaGraph:
    """A ``Recorder`` of CUDA kernels."""

    def __init__(self):
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, work: Callable[[], Any]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)

    def record(self, work: Callable[[], Tensors]) -> Tensors:
        with torch.cuda.graph(self._graph):
            return work()

    def replay(self) -> None:
        self._graph.replay()


def replayed(iterate: Callable[[Tensors], Tensors], changed: Sequence[Tensor], batch: Tensors) -> Callable:
    """Return ``iterate`` itself on the CPU, and on CUDA a function that replays its recorded kernels.

    Arguments and result as for ``record``.
    """
    if batch[0].device.type != "cuda":
        return iterate
    with torch.cuda.device(batch[0].device):
        return record(iterate, changed, batch, CudaGraph())


def record(
    iterate: Callable[[Tensors], Tensors], changed: Sequence[Tensor], batch: Tensors, recorder: Recorder
) -> Callable[[Tensors], Tensors]:
    """Record one iteration.

    Args:
        iterate: maps a batch to a tuple of tensors and changes the tensors of ``changed`` in place, the same
            operations every time and without a host sync.
        changed: restored after the warm-up, which changes them.
        batch: an example; later batches have the same shapes.
        recorder: a new one.

    Returns:
        A function of a batch. Its results are copies, so that they outlive the next replay.
    """
    inputs = tuple(part.clone(memory_format=torch.preserve_format) for part in batch)
    before = [part.clone() for part in changed]
    for _ in range(WARM_UP):
        recorder.warm_up(lambda: iterate(inputs))
    outputs = recorder.record(lambda: iterate(inputs))
    for part, value in zip(changed, before, strict=True):
        part.copy_(value)

    def replay(batch: Tensors) -> Tensors:
        for static, fresh in zip(inputs, batch, strict=True):
            static.copy_(fresh)
        recorder.replay()
        return tuple(output.clone() for output in outputs)

    return replay
