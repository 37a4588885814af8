"""What a network answers to clean images while its neurons are perturbed more and more.

Wu & Wang, *Adversarial Neuron Pruning Purifies Backdoored Deep Models*, NeurIPS 2021, section 3: where the perturbation
works against the truth, a backdoored network fails earlier than a benign one, and its wrong answers are the target
class. Random perturbations, the measure for it, do little to either.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.anp import AnpConfig, ascend, assign, hold_frozen
from defenses.defense import CleanImages
from engine.runtime import autocast
from models.noisy_layers import NoisyBatchNorm, NoisyLayer, convert_noisy, noisy_layers
from utils.config import Config, Range, one_of, setting
from utils.errors import InputError
from utils.seeding import seeded_generator

KINDS = ("adversarial", "random")


@dataclass(frozen=True)
class PerturbationConfig(Config):
    """Which perturbations to measure.

    Attributes:
        precision: data type of convolutions and linear layers, float32 or bfloat16.

    The other attributes are described where they are declared.

    Raises:
        ValueError: a value is out of its range.
    """

    eps: tuple[float, ...] = setting(
        (0.0, 0.1, 0.2, 0.3, 0.4), "sizes of the perturbation relative to the weights", Range(0)
    )
    steps: int = setting(1, "ascent steps of an adversarial perturbation, of eps / steps each", Range(1, 1e6))
    draws: int = setting(5, "perturbations of each kind and size", Range(1, 10_000))
    statistics: str = setting(
        "batch",
        "what BatchNorms normalise with: statistics of the batch, as while masks are learnt, or the running ones",
        choices=("batch", "running"),
    )
    seed: int = setting(0, "decides the signs of random perturbations and the start of adversarial ones", Range(0))
    precision: torch.dtype = one_of(torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Answers:
    """What a network answered under one perturbation.

    Attributes:
        kind: one of ``KINDS``.
        eps: size of the perturbation, relative to the weights.
        draw: its number, from 0.
        error: share of the images with a wrong answer, 0..1.
        shares: share of the answers that each class has, 0..1; they sum up to 1.
    """

    kind: str
    eps: float
    draw: int
    error: float
    shares: list[float]


def perturbed_answers(
    network: nn.Module, clean: CleanImages, config: PerturbationConfig | None = None
) -> Iterator[Answers]:
    """Measure a network under perturbations of its neurons, (1 + d) * w and (1 + x) * b with |d|, |x| <= eps.

    Random ones have d and x of eps or -eps, the largest there are. Adversarial ones climb the cross entropy from a
    random start as in ANP (equation 4), but never leave the eps-ball, so that both kinds have the same size. They are
    measured on the images that they were made for; images of one batch share a perturbation. A draw begins with the
    same random numbers for every eps and both kinds.

    Args:
        network: with neurons; it is not changed.
        clean: the defender's images.
        config: the settings; None for the defaults.

    Yields:
        The answers, in the order of eps, then of the draws.

    Raises:
        InputError: the network has no neuron that can be perturbed, or it answers NaN.
    """
    config = config or PerturbationConfig()
    noisy = convert_noisy(network).requires_grad_(False).eval()
    hold_frozen(noisy, config.precision)
    layers = list(noisy_layers(noisy).values())
    for layer in layers:
        layer.training = isinstance(layer, NoisyBatchNorm) and config.statistics == "batch"
    for eps, draw, kind in product(sorted(set(config.eps)), range(config.draws), KINDS):
        generator = seeded_generator(config.seed, "neuron perturbation", draw, device=clean.images.device)
        right, counts = 0, torch.zeros((), dtype=torch.int64)
        for inputs, labels in clean.batches():
            logits = _logits(noisy, layers, inputs, labels, kind, eps, config, generator)
            if not bool(torch.isfinite(logits).all()):
                raise InputError(f"the network answers NaN or infinite values at eps {eps:g}; is it trained?")
            answers = logits.argmax(1)
            right += int((answers == labels).sum())
            counts = counts + answers.bincount(minlength=logits.shape[1]).cpu()
        yield Answers(kind, eps, draw, 1 - right / len(clean), [count / len(clean) for count in counts.tolist()])


@torch.enable_grad()
def _logits(
    noisy: nn.Module,
    layers: list[NoisyLayer],
    inputs: Tensor,
    labels: Tensor,
    kind: str,
    eps: float,
    config: PerturbationConfig,
    generator: torch.Generator,
) -> Tensor:
    """Return what the network makes of a batch (B, ...) under a perturbation of its own: float32 (B, K)."""
    neurons = sum(len(layer._parameters["weight"]) for layer in layers)
    mask = torch.ones(1, neurons, device=inputs.device)

    def loss_of(mask: Tensor, noise: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assign(layers, mask.squeeze(0), [part.squeeze(0) for part in noise])
        with autocast(inputs.device, config.precision):
            logits = noisy(inputs).float()
        return F.cross_entropy(logits, labels), logits

    drawn = 2 * torch.rand(2, 1, neurons, generator=generator, device=inputs.device) - 1  # -1..1
    noise = _noise(kind, drawn, eps, config.steps, loss_of, mask)
    with torch.no_grad():
        return loss_of(mask, noise)[1]


def _noise(kind: str, drawn: Tensor, eps: float, steps: int, loss_of: Callable, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return d and x, (1, n) each, of random numbers (2, 1, n) in -1..1."""
    if kind == "random" or eps == 0:
        return tuple(eps * drawn.sign())
    return ascend(loss_of, mask, tuple(eps * drawn), [AnpConfig(eps=eps, steps=steps, project=True)])
