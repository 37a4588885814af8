"""Is a network backdoored, and to which class? Told from the network and a few clean images, without the trigger.

Two statistics of every class t. A class whose statistics are outliers among the others' is suspected.

The *margin* (Wang, Xiang, Miller & Kesidis, *MM-BD: Post-Training Detection of Backdoor Attacks with Arbitrary Backdoor
Pattern Types Using a Maximum Margin Statistic*, IEEE S&P 2024): the largest z_t - max over other classes of z that
gradient ascent finds from random images. A backdoor makes it large for the target class. It needs no data.

The *noise*: the share of clean images of other classes that end in class t when all neurons are perturbed towards it,
as ANP perturbs them away from the truth (Wu & Wang, NeurIPS 2021, equation 4), with the statistics of the batch.

Where every class is the target of another one, no class stands out; ``defenses.all_to_all`` looks for that.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import normalize
from data.datasets import Normalization
from defenses.all_to_all import CLASSES, EPS, PER_CLASS, STEPS, Assignment
from defenses.anp import assign
from defenses.defense import CleanImages
from engine.runtime import autocast
from models.noisy_layers import NoisyBatchNorm, NoisyLayer, convert_noisy, noisy_layers
from utils.config import Config, Range, one_of, setting
from utils.errors import InputError
from utils.seeding import seeded_generator

FEWEST = 4  # classes: what is an outlier among fewer?
STEP = 2 / 3  # of a noise's ascent, as a share of eps
MOMENTUM = 0.9  # of a margin's ascent
TOGETHER = 2000  # images of 32x32 pixels in one pass
TINY = 1e-300  # a smaller tail counts as this
ALL_TO_ALL_SHARE = 0.1  # of the level is the assignment's, where there is one


@dataclass(frozen=True)
class DetectionConfig(Config):
    """Settings of the detector.

    Raises:
        ValueError: a setting is out of range.
    """

    level: float = setting(0.05, "p-value up to which a network is called backdoored", Range(0, 1))
    margin_images: int = setting(8, "random images from which a margin is searched", Range(1, 10_000))
    margin_steps: int = setting(100, "ascent steps of a margin", Range(1, 1e6))
    margin_rate: float = setting(0.1, "length of such a step, in L2, on the 0..1 scale", Range(0, open_low=True))
    noise_eps: float = setting(0.2, "size of the noise relative to the weights", Range(0, open_low=True))
    noise_steps: int = setting(3, "ascent steps of the noise", Range(1, 1e6))
    noise_images: int = setting(200, "clean images of other classes for each class's noise", Range(2, 1e6))
    seed: int = setting(0, "decides the random images", Range(0))
    precision: torch.dtype = one_of(torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Statistic:
    """One statistic of every class, and how far the largest stands out.

    Attributes:
        values: by class.
        suspect: the class of the largest.
        p_value: 0..1; how likely the largest of so many classes is as large where no class is special.
    """

    values: list[float]
    suspect: int
    p_value: float

    @classmethod
    def of(cls, values: Tensor) -> "Statistic":
        """Say how far the largest of some values, float (K,), 0 or more, stands out."""
        suspect = int(values.argmax())
        return cls(values.double().tolist(), suspect, _largest_of_many(float(tails(values)[suspect]), len(values)))


def tails(values: Tensor) -> Tensor:
    """Return how likely each value, or a larger one, is where no class is special: float64 (K,), 0..1.

    It is compared with a gamma distribution that has mean and variance of the others (MM-BD, sec. 4).

    Args:
        values: float (K,), 0 or more.
    """
    values = values.detach().cpu().double()
    others = (~torch.eye(len(values), dtype=torch.bool)).nonzero()[:, 1].view(len(values), -1)  # (K, K - 1)
    mean, variance = values[others].mean(1), values[others].var(1)
    alike = variance <= (1e-9 * mean).square()  # but for rounding
    variance = variance.masked_fill(alike, 1)
    shape, scaled = mean.square() / variance, values * mean / variance
    upper = torch.special.gammaincc(shape, scaled)
    return torch.where(alike | (shape <= 0), (values <= mean * (1 + 1e-9)).double(), upper)


def _largest_of_many(tail: float, count: int) -> float:
    """Return how likely one of so many values at least has such a tail."""
    return 1.0 if tail >= 1 else -math.expm1(count * math.log1p(-tail))


@dataclass(frozen=True)
class Detection:
    """What the detector found.

    Attributes:
        statistics: by name; ``margin``, and ``noise`` where there are clean images.
        backdoored: the verdict.
        suspect: the class that stands out most in all statistics; None where the assignment stands out more.
        p_value: of what stands out most, divided by its share of the level.
        assignment: of each class to another one; None where classes or clean images are not such as its reference has.
    """

    statistics: dict[str, Statistic]
    backdoored: bool
    suspect: int | None
    p_value: float
    assignment: Assignment | None = None

    @classmethod
    def of(cls, statistics: dict[str, Statistic], level: float, assignment: Assignment | None = None) -> "Detection":
        """Combine what was found.

        What the statistics say of a class is combined by Fisher's method (*Statistical Methods for Research Workers*,
        1932, sec. 21.1). The class that stands out most is one of K; it and the assignment have a share of the level.
        """
        values = torch.tensor([each.values for each in statistics.values()], dtype=torch.float64)  # (S, K)
        surprise = -torch.stack([tails(each) for each in values]).clamp_min(TINY).log().sum(0)  # (K,)
        suspect = int(surprise.argmax())
        tail = torch.special.gammaincc(torch.tensor(len(values), dtype=torch.float64), surprise[suspect])
        p_value = _largest_of_many(float(tail), len(surprise)) / (1 - ALL_TO_ALL_SHARE if assignment else 1)
        if assignment and assignment.p_value / ALL_TO_ALL_SHARE < p_value:
            p_value, suspect = assignment.p_value / ALL_TO_ALL_SHARE, None
        return cls(statistics, p_value <= level, suspect, min(1.0, p_value), assignment)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it in plain containers."""
        return {
            "backdoored": self.backdoored,
            "suspect": self.suspect,
            "p_value": self.p_value,
            "statistics": {name: vars(statistic) for name, statistic in self.statistics.items()},
            "assignment": self.assignment and vars(self.assignment),
        }


def _at_once(size: Sequence[int]) -> int:
    """Return how many inputs one pass computes; ``size`` is the height and width of images, else something else."""
    height, width = size if len(size) == 2 else (32, 32)
    return max(1, TOGETHER * 32 * 32 // (height * width))


def _groups(count: int, each: int, size: Sequence[int]) -> Iterator[Tensor]:
    """Yield the classes in groups of which one pass computes all images, ``each`` of a class."""
    yield from torch.arange(count).split(max(1, _at_once(size) // each))


def _logits(network: nn.Module, num_classes: int, precision: torch.dtype, inputs: Tensor) -> Tensor:
    """Return what a network answers to its inputs (B, ...): float32 (B, K).

    Raises:
        InputError: it has not K outputs, or some are not finite.
    """
    with autocast(inputs.device, precision):
        logits = network(inputs).float()
    if logits.shape[1:] != (num_classes,):
        raise InputError(
            f"the network's output is {tuple(logits.shape)}, expected {len(inputs), num_classes}: a logit a class"
        )
    if not bool(torch.isfinite(logits).all()):
        raise InputError("the network answers NaN or infinite values; is it trained, its input normalised as then?")
    return logits


@torch.inference_mode(False)  # whatever the caller has set
@torch.enable_grad()
def margins(
    network: nn.Module, num_classes: int, size: tuple[int, int], normalization: Normalization, config: DetectionConfig
) -> Tensor:
    """Return the largest margin of each class that was found: float32 (K,), 0 where it never wins.

    Args:
        network: in eval mode.
        num_classes: K.
        size: height and width of its images, in pixels.
        normalization: of its input.
        config: the settings.

    Raises:
        InputError: the network has not K outputs, or answers NaN.
    """
    device = next(network.parameters()).device
    logits_of = partial(_logits, network, num_classes, config.precision)
    generator = seeded_generator(config.seed, "margin")
    starts = torch.rand(config.margin_images, *size, 3, generator=generator).to(device)  # (B, H, W, 3), 0..1
    found = []
    for group in _groups(num_classes, len(starts), size):
        targets = group.repeat_interleave(len(starts)).to(device)  # (G * B,)
        images, speed = starts.repeat(len(group), 1, 1, 1), 0.0
        for _ in range(config.margin_steps):
            images = images.detach().requires_grad_()
            (slope,) = torch.autograd.grad(_margin(logits_of, images, targets, normalization).sum(), images)
            slope = slope / slope.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
            speed = MOMENTUM * speed + slope
            images = (images.detach() + config.margin_rate * speed).clamp(0, 1)
        with torch.no_grad():
            margin = _margin(logits_of, images, targets, normalization)
        found.append(margin.view(len(group), -1).amax(1))
    return torch.cat(found).clamp_min(0).cpu()


def _margin(
    logits_of: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor, normalization: Normalization
) -> Tensor:
    """Return z_t - max of the others for images (B, H, W, 3) in 0..1 and targets (B,): float32 (B,)."""
    logits = logits_of(normalize(255 * images, normalization))  # (B, K)
    others = logits.scatter(1, targets[:, None], -torch.inf).amax(1)
    return logits.gather(1, targets[:, None])[:, 0] - others


def count_images(clean: CleanImages, num_classes: int, config: DetectionConfig) -> int:
    """Return on how many clean images of other classes each class's noise is measured: those asked for, or all.

    Raises:
        InputError: a label is none of the classes, or a class has too few images of others.
    """
    clean.check_labels(num_classes)
    counts = [int((clean.labels != target).sum()) for target in range(num_classes)]
    count = min(config.noise_images, *counts)
    if count < 2:
        raise InputError(f"{len(clean)} clean images, all but {count} of one class: too few for a noise towards it")
    return count


@torch.inference_mode(False)
@torch.enable_grad()
def targeted_noise(network: nn.Module, clean: CleanImages, num_classes: int, config: DetectionConfig) -> Tensor:
    """Return the share of clean images of other classes that a noise towards each class sends there: float32 (K,).

    Args:
        network: with neurons; it is not changed.
        clean: the defender's images.
        num_classes: K.
        config: the settings.

    Raises:
        InputError: the network has no neuron that can be perturbed, has not K outputs or answers NaN, or as
            ``count_images``.
    """
    layers, logits_of = _perturbable(network, num_classes, config.precision)
    grouped = all(type(layer) is NoisyBatchNorm for layer in layers)
    inputs = torch.cat([inputs for inputs, _ in clean.batches()])  # (N, ...)
    count, found = count_images(clean, num_classes, config), []
    for group in _groups(num_classes, count, inputs.shape[2:]) if grouped else torch.arange(num_classes).split(1):
        index = torch.cat([(clean.labels != int(target)).nonzero()[:count, 0] for target in group])  # (G * count,)
        targets = group.repeat_interleave(count).to(inputs.device)
        found.append(_reached(logits_of, layers, inputs[index], targets, len(group), config))
    return torch.cat(found).cpu()


def _perturbable(
    network: nn.Module, num_classes: int, precision: torch.dtype
) -> tuple[list[NoisyLayer], Callable[[Tensor], Tensor]]:
    """Return the layers of a network's noisy copy, and what returns its logits with the statistics of the batch."""
    noisy = convert_noisy(network).requires_grad_(False).eval()
    layers = list(noisy_layers(noisy).values())
    for layer in layers:
        layer.training = isinstance(layer, NoisyBatchNorm)  # as in ANP: statistics of the batch
    return layers, partial(_logits, noisy, num_classes, precision)


def _climb(objective: Callable[[list[Tensor]], Iterable[Tensor]], like: Tensor, steps: int, eps: float) -> list[Tensor]:
    """Return noise (d, x) that climbs the sum of an objective's parts by the sign of its slope, within eps, from 0."""
    noise = [torch.zeros_like(like) for _ in range(2)]
    for _ in range(steps):
        noise = [part.detach().requires_grad_() for part in noise]
        slopes = [torch.zeros_like(part) for part in noise]
        for value in objective(noise):  # one batch after the other
            more = torch.autograd.grad(value, noise, materialize_grads=True)
            slopes = [slope + each for slope, each in zip(slopes, more, strict=True)]
        noise = [(part + STEP * eps * g.sign()).clamp(-eps, eps) for part, g in zip(noise, slopes, strict=True)]
    return [part.detach() for part in noise]


def _reached(
    logits_of: Callable[[Tensor], Tensor],
    layers: list[NoisyLayer],
    inputs: Tensor,
    targets: Tensor,
    classes: int,
    config: DetectionConfig,
) -> Tensor:
    """Perturb the neurons towards the targets of each of some classes; return the share that gets there: (classes,)."""
    neurons = sum(len(layer._parameters["weight"]) for layer in layers)
    mask = torch.ones(classes, neurons, device=inputs.device)

    def perturbed(noise: list[Tensor]) -> Tensor:
        assign(layers, mask.squeeze(0), [part.squeeze(0) for part in noise])
        return logits_of(inputs)  # (classes * count, K)

    def towards(noise: list[Tensor]) -> Iterator[Tensor]:
        yield -F.cross_entropy(perturbed(noise), targets, reduction="sum")  # a class's noise sees its own images alone

    noise = _climb(towards, mask, config.noise_steps, config.noise_eps)
    with torch.no_grad():
        return (perturbed(noise).argmax(1) == targets).float().view(classes, -1).mean(1)


@torch.inference_mode(False)
@torch.enable_grad()
def confusion(network: nn.Module, clean: CleanImages, num_classes: int) -> Tensor:
    """Return how probable each class is for the images of each class, under noise that climbs their cross entropy.

    All of it is computed in float32.

    Args:
        network: with neurons; it is not changed.
        clean: the defender's images.
        num_classes: K.

    Returns:
        float32 (K, K), rows are the true classes; 0 in the row of a class without images.

    Raises:
        InputError: as ``targeted_noise``.
    """
    clean.check_labels(num_classes)
    layers, logits_of = _perturbable(network, num_classes, torch.float32)
    inputs = torch.cat([inputs for inputs, _ in clean.batches()])  # (N, ...)
    parts = math.ceil(len(inputs) / _at_once(inputs.shape[2:]))
    batches = [(inputs[first::parts], clean.labels[first::parts]) for first in range(parts)]  # each of all classes
    mask = torch.ones(sum(len(layer._parameters["weight"]) for layer in layers), device=inputs.device)

    def perturbed(noise: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        assign(layers, mask, noise)
        for batch, labels in batches:
            yield logits_of(batch), labels

    def away(noise: list[Tensor]) -> Iterator[Tensor]:
        for logits, labels in perturbed(noise):
            yield F.cross_entropy(logits, labels, reduction="sum")

    noise = _climb(away, mask, STEPS, EPS)
    found = torch.zeros(num_classes, num_classes, device=inputs.device)
    with torch.no_grad():
        for logits, labels in perturbed(noise):
            found.index_add_(0, labels, logits.softmax(1))
    counts = torch.bincount(clean.labels, minlength=num_classes).clamp_min(1)
    return (found / counts[:, None]).cpu()


def detect(
    network: nn.Module,
    num_classes: int,
    size: tuple[int, int],
    normalization: Normalization,
    clean: CleanImages | None = None,
    config: DetectionConfig | None = None,
    tell: Callable[[str], None] = lambda name: None,
) -> Detection:
    """Say whether a network is backdoored.

    Args:
        network: any classifier of images in 0..1 once normalised; for the noise it needs neurons. It is not changed.
        num_classes: its classes, 4 or more.
        size: height and width of its images, in pixels.
        normalization: of its input.
        clean: the defender's images; None: the margin alone, which needs none. The assignment takes
            ten classes and 25 images of each.
        config: the settings.
        tell: called with the name of each statistic before it is computed.

    Raises:
        InputError: there are too few classes, or as ``margins`` and ``targeted_noise``.
    """
    config = config or DetectionConfig()
    if num_classes < FEWEST:
        raise InputError(f"{num_classes} classes: among fewer than {FEWEST} none can stand out")
    if clean is not None:
        count_images(clean, num_classes, config)  # before the margins, which take longer
    trainable = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    modes = [(module, module.training) for module in network.modules()]
    assignment = None
    network.requires_grad_(False).eval()
    try:
        tell("margin")
        statistics = {"margin": Statistic.of(margins(network, num_classes, size, normalization, config))}
        if clean is not None:
            tell("noise")
            statistics["noise"] = Statistic.of(targeted_noise(network, clean, num_classes, config))
            if num_classes == CLASSES and int(torch.bincount(clean.labels, minlength=CLASSES).min()) >= PER_CLASS:
                tell("assignment")
                assignment = Assignment.of(confusion(network, clean, num_classes))
    finally:
        for module, training in modes:
            module.training = training
        for parameter, wanted in trainable:
            parameter.requires_grad_(wanted)
    return Detection.of(statistics, config.level, assignment)
