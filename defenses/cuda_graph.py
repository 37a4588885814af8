"""Record the kernels of one mask iteration once and replay them: on a GPU the loop is bound by launches."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from defenses.anp import AnpState

WARM_UP = 3  # runs before the recording, in which libraries choose kernels and allocate workspaces


def replayed(iterate: Callable, state: "AnpState", batch: tuple[Tensor, ...]) -> Callable:
    """Return ``iterate`` itself on the CPU, and on CUDA a function that replays its recorded kernels.

    Args:
        iterate: maps a batch to a tuple of tensors and changes ``state.mask`` and ``state.momentum`` in place, the
            same kernels every time and without a host sync.
        state: restored after the warm-up, which changes it.
        batch: an example; later batches have the same shapes.

    Returns:
        A function of a batch. On CUDA its results are copies, so that they outlive the next replay.
    """
    if batch[0].device.type != "cuda":
        return iterate
    with torch.cuda.device(batch[0].device):
        return _record(iterate, state, batch)


def _record(iterate: Callable, state: "AnpState", batch: tuple[Tensor, ...]) -> Callable:
    inputs = tuple(part.clone(memory_format=torch.preserve_format) for part in batch)
    saved = state.mask.clone(), state.momentum.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            iterate(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = iterate(inputs)
    state.mask.copy_(saved[0])
    state.momentum.copy_(saved[1])

    def replay(batch):
        for static, fresh in zip(inputs, batch, strict=True):
            static.copy_(fresh)
        graph.replay()
        return tuple(output.clone() for output in outputs)

    return replay
