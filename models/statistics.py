"""The running statistics of BatchNorms, measured anew."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def measure_statistics(network: nn.Module, run: Callable[[], None]) -> None:
    """Replace the running statistics of every BatchNorm by means over the batches that ``run`` passes through.

    Everything else of the network is in eval mode meanwhile, and all of it afterwards.

    Args:
        network: changed in place.
        run: calls the network on each batch; all of one size, since every batch counts the same.
    """
    norms = [layer for layer in network.eval().modules() if isinstance(layer, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches so far
        norm.training = True
    try:
        run()
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        network.eval()
