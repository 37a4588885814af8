"""Neurons: the channels of the layers that ``models.neuron_layers`` names, and how they are pruned.

Wu & Wang, *Adversarial Neuron Pruning Purifies Backdoored Deep Models*, NeurIPS 2021, section 4.
"""

import copy
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from models.neuron_layers import neuron_layers
from models.noisy_layers import noisy_layers

MASK_DECIMALS = 4  # of every mask, so that a file and a Python list prune the same neurons at any threshold


class Neuron(NamedTuple):
    """One channel: module path of the layer, channel, mask in 0..1."""

    layer: str
    index: int
    mask: float


class PruningPoint(NamedTuple):
    """One row of a sweep to come: prune the first ``count`` neurons of the sorted list.

    ``last`` is the last of them, None if there is none. ``threshold`` is None where neurons are counted.
    """

    count: int
    last: Neuron | None
    threshold: float | None

    @property
    def mask(self) -> float | None:
        """The mask up to which neurons are pruned."""
        return self.last.mask if self.threshold is None and self.last else self.threshold


def mask_values(network: nn.Module) -> list[Neuron]:
    """Return every neuron of a converted network with its mask, rounded to 4 decimals, in state_dict order.

    Raises:
        ValueError: a mask is NaN, as after a step on a loss that was.
    """
    neurons = [
        Neuron(name, index, round(mask, MASK_DECIMALS))
        for name, layer in noisy_layers(network).items()
        for index, mask in enumerate(layer.mask.tolist())
    ]
    if any(math.isnan(neuron.mask) for neuron in neurons):
        raise ValueError("the masks are NaN: the loss was not finite; look at the images and lower lr or eps")
    return neurons


def sort_neurons(neurons: Iterable[Neuron]) -> list[Neuron]:
    """Sort by mask, smallest first; ties keep their order."""
    return sorted(neurons, key=lambda neuron: neuron.mask)


def neurons_up_to(neurons: Iterable[Neuron], threshold: float) -> list[Neuron]:
    """Return the neurons with mask <= threshold, smallest mask first."""
    return [neuron for neuron in sort_neurons(neurons) if neuron.mask <= threshold]


def threshold_point(neurons: list[Neuron], threshold: float) -> PruningPoint:
    """Return the point that prunes every neuron with mask <= threshold; ``neurons`` are sorted by mask."""
    count = bisect_right(neurons, threshold, key=lambda neuron: neuron.mask)
    return PruningPoint(count, neurons[count - 1] if count else None, threshold)


def check_neurons(network: nn.Module, neurons: Iterable[Neuron]) -> None:
    """Make sure that every neuron is one of the network.

    Raises:
        ValueError: a layer is missing, has no neurons, or has fewer channels.
    """
    layers = neuron_layers(network)
    for layer, index, _ in neurons:
        if layer not in layers:
            raise ValueError(f"the network has no layer {layer!r} with neurons")
        if not 0 <= index < len(layers[layer].weight):
            raise ValueError(f"{layer} has {len(layers[layer].weight)} channels, there is no channel {index}")


def prune_neurons(network: nn.Module, neurons: Iterable[Neuron]) -> None:
    """Prune in place: set the weight of each neuron to 0, so that its channel becomes its constant bias.

    Raises:
        ValueError: a neuron is not in the network; nothing is pruned then.
    """
    neurons = list(neurons)
    check_neurons(network, neurons)
    channels = defaultdict(list)
    for layer, index, _ in neurons:
        channels[layer].append(index)
    with torch.no_grad():
        for layer, indices in channels.items():
            network.get_submodule(layer).weight[indices] = 0


def pruned_copy(network: nn.Module, neurons: Iterable[Neuron]) -> nn.Module:
    """Return a copy of the network without these neurons; raises as ``prune_neurons``."""
    pruned = copy.deepcopy(network)
    prune_neurons(pruned, neurons)
    return pruned
