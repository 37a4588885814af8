"""Record the kernels of one iteration once and replay them: on a GPU such loops are bound by launches.

A recording is used only if it can be made and if it computes what the loop computes; else the loop goes on as it is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.console import announce
from utils.errors import shorten

Tensors = tuple[Tensor, ...]
WARM_UP = 3  # runs before the recording, in which libraries choose kernels and allocate workspaces
SPREAD = 10  # how much more than two runs of the loop itself a replay may differ from the loop


class Recorder(Protocol):
    """What runs work, records its operations and repeats them on the same memory."""

    def warm_up(self, work: Callable[[], Tensors]) -> Tensors:
        """Run the work without recording; returns its results."""

    def record(self, work: Callable[[], Tensors]) -> Tensors:
        """Record the work; returns its results, which every replay writes anew."""

    def replay(self) -> None:
        """Repeat the recorded operations."""


class CudaGraph:
    """A ``Recorder`` of CUDA kernels, on a stream of its own."""

    def __init__(self):
        self._graph, self._stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def warm_up(self, work: Callable[[], Tensors]) -> Tensors:
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                return work()
        finally:  # also what failed halfway may still be writing
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Callable[[], Tensors]) -> Tensors:
        with _waiting_refused():  # while nothing is captured such an error does no harm
            self.warm_up(work)
        before = torch.cuda.get_rng_state()
        # The outer block: where a capture cannot be ended, PyTorch leaves the stream of the inner one in use.
        with torch.cuda.stream(self._stream):
            try:
                with torch.cuda.graph(self._graph, stream=self._stream):
                    return work()
            except BaseException:
                _renew_generator(before)
                raise

    def replay(self) -> None:
        self._graph.replay()


@contextmanager
def _waiting_refused() -> Iterator[None]:
    """Let everything in the block that waits for the device raise ``RuntimeError``."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _renew_generator(state: Tensor) -> None:
    """Free CUDA's default generator from a capture that failed: it would wait for the capture's end for ever."""
    index = torch.cuda.current_device()
    fresh = torch.Generator(torch.device("cuda", index))
    fresh.set_state(state)
    torch.cuda.default_generators[index].graphsafe_set_state(fresh)


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
    """Record one iteration, and compare a replay with the iteration itself, from the same state on the same batch.

    Afterwards the tensors of ``changed`` and the default random generators are as they were, whatever happened.

    Args:
        iterate: maps a batch to a tuple of tensors and changes the tensors of ``changed`` in place, the same
            operations every time and without a host sync.
        changed: all tensors whose values outlive an iteration.
        batch: an example; later batches have the same shapes.
        recorder: a new one.

    Returns:
        A function of a batch. Its results are copies, so that they outlive the next replay. ``iterate`` itself, and
        one line is printed, where the recording failed or computes something else.
    """
    inputs = tuple(part.clone(memory_format=torch.preserve_format) for part in batch)
    before = [part.detach().clone() for part in changed]
    gpus = sorted({part.device.index for part in inputs if part.is_cuda})

    def attempt(run: Callable[[], Any]) -> Any:
        """Return what a function returns, and put back what it changes."""
        try:
            with torch.random.fork_rng(gpus):
                return run()
        finally:
            with torch.no_grad():
                for part, value in zip(changed, before, strict=True):
                    part.copy_(value)

    def outcome(run: Callable[[], Tensors]) -> list[Tensor]:
        """Return copies of all results of an iteration and of all that it changes, which is put back."""
        return attempt(lambda: [part.detach().clone() for part in (*run(), *changed)])

    def replay(batch: Tensors) -> Tensors:
        for static, fresh in zip(inputs, batch, strict=True):
            static.copy_(fresh)
        recorder.replay()
        return tuple(output.clone() for output in outputs)

    eager = [outcome(lambda: recorder.warm_up(lambda: iterate(inputs))) for _ in range(WARM_UP)]
    try:
        outputs = attempt(lambda: recorder.record(lambda: iterate(inputs)))
    except Exception as error:  # the same work has just run: whatever fails now, the recording is the reason
        first = error.__context__ or error  # where the end of the capture fails as well
        reason = shorten(f"{type(first).__name__}: {first}".partition("\n")[0])
        announce(f"no CUDA graph, so this takes longer: the iteration cannot be recorded ({reason})")
        return iterate
    if not _agree(eager, outcome(lambda: replay(batch))):
        announce("warning: no CUDA graph, so this takes longer: the recorded iteration gave other numbers")
        return iterate
    return replay


def _agree(eager: Sequence[Sequence[Tensor]], again: Sequence[Tensor]) -> bool:
    """Say whether a replay gave what the loop gives: the same bits, in bf16 as in fp32.

    Both launch the same kernels, so rounding is no excuse. Only where the loop itself does not repeat its bits (a
    network with an operation that adds up in any order) may a replay differ, by ``SPREAD`` times as much.
    """
    *_, one, other = eager
    allowed = SPREAD * max(map(_difference, one, other))
    return all(_difference(*pair) <= allowed for pair in zip(again, other, strict=True))


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference between two tensors, relative to the largest value; two NaNs do not differ."""
    differs = ~((one == other) | (one.isnan() & other.isnan()))
    if not differs.any():
        return 0.0
    one, other = one.double(), other.double()
    return float((one - other)[differs].abs().max() / other.abs().max())
