"""Prune the neurons whose mask came out small (Wu & Wang, NeurIPS 2021, section 4.3)."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.noisy_batchnorm import noisy_layers

Metrics = TypeVar("Metrics")


class Neuron(NamedTuple):
    """One BatchNorm channel: module path of the layer, channel, mask in 0..1."""

    layer: str
    index: int
    mask: float


class PruningPoint(NamedTuple):
    """One row of a sweep to come: prune the first ``count`` neurons of the sorted list.

    ``last`` is the last of them (None if there is none); ``value`` the threshold, or that neuron's mask.
    """

    count: int
    last: Neuron | None
    value: float | None


@dataclass(frozen=True)
class SweepRow(Generic[Metrics]):
    """A point of the sweep and what the pruned network measured there."""

    point: PruningPoint
    metrics: Metrics


def mask_values(network: nn.Module) -> list[Neuron]:
    """Return every neuron of a converted network with its mask, in state_dict order."""
    return [
        Neuron(name, index, value)
        for name, layer in noisy_layers(network).items()
        for index, value in enumerate(layer.mask.tolist())
    ]


def sort_neurons(neurons: Iterable[Neuron]) -> list[Neuron]:
    """Sort by mask, smallest first; ties keep their order."""
    return sorted(neurons, key=lambda neuron: neuron.mask)


def neurons_up_to(neurons: Iterable[Neuron], threshold: float) -> list[Neuron]:
    """Return the neurons with mask <= threshold, smallest mask first."""
    return [neuron for neuron in sort_neurons(neurons) if neuron.mask <= threshold]


def check_neurons(network: nn.Module, neurons: Iterable[Neuron]) -> None:
    """Make sure that every neuron is an affine BatchNorm channel of the network.

    Raises:
        ValueError: a layer is missing, is no affine BatchNorm, or has fewer channels.
    """
    layers = dict(network.named_modules())
    for neuron in neurons:
        layer = layers.get(neuron.layer)
        if not isinstance(layer, _BatchNorm) or layer.weight is None:
            raise ValueError(f"the network has no affine BatchNorm {neuron.layer!r}")
        if not 0 <= neuron.index < layer.num_features:
            raise ValueError(f"{neuron.layer} has {layer.num_features} channels, there is no channel {neuron.index}")


def prune_neurons(network: nn.Module, neurons: Iterable[Neuron]) -> None:
    """Prune in place: set the BatchNorm scale of each neuron to 0, so that its channel becomes its constant shift.

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


def _steps(maximum: float, step: float) -> Iterator[Decimal]:
    """Yield 0, step, 2 * step, ... up to and including maximum, in exact decimals."""
    step, maximum = Decimal(str(step)), Decimal(str(maximum))
    if step <= 0 or maximum < 0:
        raise ValueError(f"a sweep needs a step above 0 and a maximum of at least 0, got {step} and {maximum}")
    for number in range(int(maximum / step) + 1):
        yield number * step


def threshold_points(neurons: list[Neuron], maximum: float, step: float) -> list[PruningPoint]:
    """Plan a sweep over thresholds 0, step, 2 * step, ... up to and including ``maximum``.

    Args:
        neurons: sorted by mask.
        maximum: largest threshold, 0..1.
        step: distance of the thresholds, above 0.

    Raises:
        ValueError: a number is out of range.
    """
    return [threshold_point(neurons, threshold) for threshold in map(float, _steps(maximum, step))]


def threshold_point(neurons: list[Neuron], threshold: float) -> PruningPoint:
    """Return the point that prunes every neuron with mask <= threshold; ``neurons`` are sorted by mask."""
    count = sum(neuron.mask <= threshold for neuron in neurons)
    return PruningPoint(count, neurons[count - 1] if count else None, threshold)


def number_points(neurons: list[Neuron], maximum: float, step: float) -> list[PruningPoint]:
    """Plan a sweep that prunes step, 2 * step, ... neurons, never past ``maximum`` or the end of the list.

    Args:
        neurons: sorted by mask.
        maximum: largest number of neurons.
        step: whole number of neurons, at least 1.

    Raises:
        ValueError: a number is out of range.
    """
    counts = [int(count) for count in _steps(min(maximum, len(neurons)), step)][1:]
    return [PruningPoint(count, neurons[count - 1], neurons[count - 1].mask) for count in counts]


def sweep(
    network: nn.Module,
    neurons: list[Neuron],
    points: Iterable[PruningPoint],
    evaluate: Callable[[nn.Module], Metrics],
) -> Iterator[SweepRow[Metrics]]:
    """Evaluate the network as it came, then pruned at every point.

    Points that prune no further neuron repeat the row before without evaluating again.

    Args:
        network: the untouched network; it is not changed.
        neurons: sorted by mask.
        points: the plan, with rising counts.
        evaluate: measures a network; called on a copy in eval mode.

    Yields:
        One row for the untouched network, then one for each point.

    Raises:
        ValueError: a neuron is not in the network.
    """
    pruned, count = copy.deepcopy(network).eval(), 0
    metrics = evaluate(pruned)
    yield SweepRow(PruningPoint(0, None, None), metrics)
    for point in points:
        if point.count > count:
            prune_neurons(pruned, neurons[count : point.count])
            count, metrics = point.count, evaluate(pruned)
        yield SweepRow(point, metrics)


def largest_within_drop(
    rows: list[SweepRow[Metrics]], accuracy: Callable[[Metrics], float], max_drop: float
) -> SweepRow[Metrics]:
    """Choose the operating point from clean data: the last row that costs at most ``max_drop`` of accuracy.

    Args:
        rows: a sweep; the first row is the untouched network.
        accuracy: reads the accuracy on the *defender's* images, 0..1, from a row's metrics.
        max_drop: the largest accepted drop, 0..1.
    """
    floor = accuracy(rows[0].metrics) - max_drop
    return [row for row in rows if accuracy(row.metrics) >= floor - 1e-9][-1]
