"""All of ANP in one call, for a network and images of one's own."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data.augment import Transform
from defenses.anp import AnpConfig, optimize_masks
from defenses.defense import CleanImages
from defenses.pruning import LAST_THRESHOLD, THRESHOLD_STEP, Choice, ChoiceConfig, choose, threshold_points
from engine.sweep import SweepLoop
from models.neurons import Neuron, PruningPoint, mask_values, pruned_copy, sort_neurons
from models.noisy_layers import convert_noisy


@dataclass(frozen=True)
class Repaired:
    """What a repair returned.

    Attributes:
        network: a copy, in eval mode, with the chosen neurons pruned.
        neurons: all neurons with their masks, smallest first.
        points: of the sweep; the first one prunes nothing.
        accuracies: of each point on the clean images, 0..1.
        choice: the operating point, in words and why.
    """

    network: nn.Module
    neurons: list[Neuron]
    points: list[PruningPoint]
    accuracies: list[float]
    choice: Choice


@torch.inference_mode(False)  # whatever the caller has set: masks need gradients
def repair(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: AnpConfig | None = None,
    choice: ChoiceConfig | None = None,
    transform: Transform | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Repaired:
    """Learn the masks, sweep over thresholds, choose the operating point from the clean images alone, and prune.

    Args:
        network: any network with neurons (``models.neuron_layers``); it is not changed.
        images: clean images as the network expects them, on its device; some hundreds.
        labels: their classes.
        config: of the mask optimisation; None for the paper's.
        choice: of the operating point; None for the paper's threshold of 0.2.
        transform: ``transform(batch, generator)`` augments a batch for the mask optimisation; None: no augmentation.
        progress: sees the iterations pass, such as ``tqdm``.

    Shape:
        images: float (N, ...). labels: int64 (N,).

    Raises:
        ValueError: the network has no neuron, a layer cannot be masked, images and labels do not match or are not
            finite, the masks diverged, or ``progress`` dropped iterations.
    """
    config, clean = config or AnpConfig(), CleanImages(images, labels, transform)
    noisy = convert_noisy(network)
    done = sum(1 for _ in progress(optimize_masks(noisy, images, labels, config, transform)))
    if done != config.iterations:
        raise ValueError(f"progress passed on {done} of {config.iterations} iterations")
    neurons = sort_neurons(mask_values(noisy))
    points = threshold_points(neurons, LAST_THRESHOLD, THRESHOLD_STEP)
    sweep = SweepLoop(network, neurons, points, clean.accuracy)
    accuracies = [row.report for row in sweep.steps()]
    chosen = choose(neurons, sweep.points, accuracies, choice or ChoiceConfig())
    repaired = pruned_copy(network, neurons[: chosen.point.count]).eval()
    return Repaired(repaired, neurons, sweep.points, accuracies, chosen)
