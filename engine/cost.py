"""What a network costs: parameters, floating-point operations, time."""

import time
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SPEED_SECONDS = 4.0  # after which no further round begins


@torch.no_grad()
def cost(network: nn.Module, size: tuple[int, ...]) -> dict[str, int]:
    """Return the number of parameters, and the FLOPs of one input: multiplications and additions of mixing layers.

    Args:
        network: in eval mode.
        size: of one input, without the batch: (3, 32, 32).
    """
    parameters = list(network.parameters())
    with FlopCounterMode(display=False) as counter:
        network(parameters[0].new_zeros(1, *size))
    return {"parameters": sum(each.numel() for each in parameters), "flops": counter.get_total_flops()}


@torch.inference_mode()
def images_per_second(networks: list[nn.Module], images: Tensor) -> list[float]:
    """Return the speed of each network on the same images: medians of rounds in which one follows the other.

    It takes ``SPEED_SECONDS``, or two rounds where these last longer; the first one is not counted.

    Args:
        networks: such as ``inference_copy`` returns.
        images: float (B, 3, H, W), normalised, in the networks' data type and on their device.
    """
    start, rounds = time.perf_counter(), []
    while len(rounds) < 2 or time.perf_counter() - start < SPEED_SECONDS:
        rounds.append([_seconds(network, images) for network in networks])
    return [len(images) / median(seconds) for seconds in zip(*rounds[1:], strict=True)]


def _seconds(network: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    network(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - start
