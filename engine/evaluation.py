"""The one evaluation: mean loss and accuracy of a network on images held in memory."""

import copy
import math
from dataclasses import astuple, dataclass, fields, replace
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.optimization import fuse
from tqdm import tqdm

from data.augment import normalize
from data.datasets import ImageSet, Normalization
from data.pictures import BAR_DELAY
from data.triggers import Trigger, TriggeredSet, triggered_test_set
from models.tracing import traced
from utils.config import Config, Range, setting

EVALUATION_BATCH = 500  # images of 32x32 pixels
CARD_NAMES = {
    "clean": "clean_accuracy",
    "triggered": "attack_success_rate",
    "defender": "defender_accuracy",
    "cross": "cross_trigger_accuracy",
    "robust": "robust_accuracy",
}
COLUMN_NAMES = {
    "clean": "C-Acc %",
    "triggered": "ASR %",
    "defender": "defender acc %",
    "cross": "cross %",
    "robust": "R-Acc %",
}


@dataclass(frozen=True)
class BatchConfig(Config):
    """How to evaluate."""

    batch_size: int | None = setting(
        None, "images in an evaluation batch; changes the speed alone (default: 500, fewer if large)", Range(1, 100_000)
    )


class NotFinite(ArithmeticError):
    """A network's loss is NaN or infinite."""


@dataclass(frozen=True)
class Metrics:
    """Mean cross entropy over the images (nats) and accuracy, 0..1."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Report:
    """What one network measured; ``triggered.accuracy`` is the attack success rate, None without a trigger.

    ``defender`` is the accuracy on the defender's own clean images, None in step 1. ``cross`` is the accuracy
    on test images with the triggers of other images, None for attacks whose trigger is the same on every image.
    ``robust`` is the accuracy on the triggered images, judged by their true classes (R-Acc), None where not asked for.
    """

    clean: Metrics
    triggered: Metrics | None
    defender: Metrics | None
    cross: Metrics | None = None
    robust: Metrics | None = None

    def known(self) -> dict[str, Metrics]:
        """Return what was measured, by name."""
        return {each.name: metrics for each in fields(self) if (metrics := getattr(self, each.name))}

    def rounded(self) -> dict[str, float]:
        """Return the figures for a model card: accuracies in percent."""
        return {CARD_NAMES[name]: round(percent(metrics.accuracy), 2) for name, metrics in self.known().items()}

    def row(self) -> dict[str, float]:
        """Return the figures by the names of a log's columns: losses in nats, accuracies in percent."""
        losses = {f"{name} loss": metrics.loss for name, metrics in self.known().items()}
        return losses | {COLUMN_NAMES[name]: percent(metrics.accuracy) for name, metrics in self.known().items()}

    def state_dict(self) -> dict[str, list[float]]:
        """Return all figures in plain containers."""
        return {name: list(astuple(metrics)) for name, metrics in self.known().items()}

    @classmethod
    def from_state_dict(cls, state: dict[str, list[float]]) -> "Report":
        """Return the report of which ``state`` is the ``state_dict``."""
        return cls(**{each.name: Metrics(*state[each.name]) if each.name in state else None for each in fields(cls)})

    def __str__(self) -> str:
        asr = f"{percent(self.triggered.accuracy):.2f} %" if self.triggered else "not known (no trigger)"
        cross = f", with other images' triggers {percent(self.cross.accuracy):.2f} %" if self.cross else ""
        robust = f", R-Acc {percent(self.robust.accuracy):.2f} %" if self.robust else ""
        return f"C-Acc {percent(self.clean.accuracy):.2f} %, ASR {asr}{cross}{robust}"


@dataclass(frozen=True)
class Reports:
    """What several networks measured, by seed."""

    reports: dict[str, Report]

    def row(self) -> dict[str, Any]:
        """Return the means of the figures by the names of a log's columns; of several seeds, those of each as well."""
        rows = {seed: report.row() for seed, report in self.reports.items()}
        means = {name: fmean(row[name] for row in rows.values()) for name in next(iter(rows.values()))}
        return {**means, "by seed": rows} if len(rows) > 1 else means


def is_guessing(accuracy: float, num_classes: int, count: int) -> bool:
    """Say whether an accuracy on ``count`` images, 0..1, is within three standard errors of guessing, or below."""
    guess = 1 / num_classes
    return accuracy <= guess + 3 * math.sqrt(guess * (1 - guess) / count)


def is_ruined(before: float, after: float, images: ImageSet) -> bool:
    """Say whether a network that knew the classes of some images only guesses now; accuracies are 0..1."""
    guessing = [is_guessing(accuracy, images.num_classes, len(images)) for accuracy in (before, after)]
    return guessing == [False, True]


def percent(share: float) -> float:
    """Return a share of 1 in percent."""
    return 100 * share


def inference_copy(network: nn.Module, precision: torch.dtype) -> nn.Module:
    """Put a network into eval mode and return a copy for evaluation.

    Its weights are in ``precision`` and channels last, BatchNorms folded into convolutions. A network that cannot be
    folded is copied as it is and computes the same, only slower.
    """
    folded = _folded(network.eval())
    return (copy.deepcopy(network) if folded is None else folded).to(precision, memory_format=torch.channels_last)


def _folded(network: nn.Module) -> nn.Module | None:
    """Return a folded copy, or None where folding is not possible or would change what is computed."""
    graph = traced(network)
    return None if graph is None else fuse(graph, no_trace=True)


def evaluation_batch(size: tuple[int, int]) -> int:
    """Return how many images are measured at once: fewer of large ones, so that they take no more memory.

    Args:
        size: height and width, in pixels.
    """
    height, width = size
    return max(1, min(EVALUATION_BATCH, EVALUATION_BATCH * 32 * 32 // (height * width)))


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    image_set: ImageSet,
    normalization: Normalization,
    precision: torch.dtype,
    batch_size: int = EVALUATION_BATCH,
) -> Metrics:
    """Measure an inference copy; results are read from the device once, at the end.

    Raises:
        ZeroDivisionError: the set is empty.
    """
    loss = torch.zeros((), dtype=torch.float64, device=image_set.images.device)
    correct = torch.zeros_like(loss)
    batches = list(zip(image_set.images.split(batch_size), image_set.labels.split(batch_size), strict=True))
    for images, labels in tqdm(batches, "measuring", leave=False, disable=None, delay=BAR_DELAY, unit="batch"):
        logits = network(normalize(images, normalization).to(precision)).float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return Metrics(loss.item() / len(image_set), correct.item() / len(image_set))


class Evaluator:
    """Measures networks on images that only the person at the keyboard has: test set, trigger.

    Args:
        clean_test: the clean test images.
        attack: the attacker's trigger, or images that have one already; None where neither is known.
        normalization: of the network's input.
        precision: data type of the evaluation.
        defender: the defender's clean images; None where there is no defender yet.
        cross: also measure the accuracy on images with the triggers of other images; not known of images.
        batch_size: images in an evaluation batch, None for ``evaluation_batch``; changes the speed, not the result.
        robust: also measure how many triggered images are given their true class.

    Raises:
        InputError: the trigger does not fit the test images.
    """

    def __init__(
        self,
        clean_test: ImageSet,
        attack: Trigger | TriggeredSet | None,
        normalization: Normalization,
        precision: torch.dtype,
        defender: ImageSet | None = None,
        cross: bool = False,
        batch_size: int | None = None,
        robust: bool = False,
    ):
        self.sets = {"clean": clean_test, "triggered": None, "defender": defender, "cross": None, "robust": None}
        triggered = triggered_test_set(clean_test, attack) if isinstance(attack, Trigger) else attack
        self.sets["triggered"] = triggered
        if cross and isinstance(attack, Trigger):
            self.sets["cross"] = crossed(clean_test, attack)
        if robust and triggered is not None:
            self.sets["robust"] = triggered.with_true_labels()
        self.normalization, self.precision = normalization, precision
        self.batch_size = batch_size or evaluation_batch(clean_test.images.shape[1:3])

    @property
    def largest(self) -> int:
        """Images of the largest set."""
        return max(len(images) for images in self.sets.values() if images)

    def __call__(self, network: nn.Module) -> Report:
        """Measure one network on every set that is known.

        Raises:
            NotFinite: the loss on clean images is NaN or infinite, as after a training that diverged.
        """
        network = inference_copy(network, self.precision)
        report = Report(
            **{
                name: evaluate(network, images, self.normalization, self.precision, self.batch_size) if images else None
                for name, images in self.sets.items()
            }
        )
        if not math.isfinite(report.clean.loss):
            raise NotFinite(f"the network's loss on clean images is {report.clean.loss}")
        return report


def crossed(images: ImageSet, trigger: Trigger) -> ImageSet:
    """Return every image with the trigger of the next one and its own label."""
    others = torch.arange(1, len(images) + 1) % len(images)
    return replace(images, images=trigger.stamp(images.images, others))
