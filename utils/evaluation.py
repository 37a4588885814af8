"""The one evaluation: mean loss and accuracy of a network on images held in memory."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.optimization import fuse

from data.augment import normalize
from data.datasets import ImageSet, Normalization
from data.errors import InputError
from data.triggers import Trigger, triggered_test_set

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Metrics:
    """Mean cross entropy over the images (nats) and accuracy, 0..1."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Report:
    """What one network measured; ``triggered.accuracy`` is the attack success rate, None without a trigger.

    ``defender`` is the accuracy on the defender's own clean images, None where step 1 asks. ``cross`` is the accuracy
    on test images with the triggers of other images, None for attacks whose trigger is the same on every image.
    """

    clean: Metrics
    triggered: Metrics | None
    defender: Metrics | None
    cross: Metrics | None = None

    def rounded(self) -> dict[str, float]:
        """Return the figures for a model card: accuracies in percent."""
        names = {
            "clean_accuracy": self.clean,
            "attack_success_rate": self.triggered,
            "defender_accuracy": self.defender,
            "cross_trigger_accuracy": self.cross,
        }
        return {name: round(percent(metrics.accuracy), 2) for name, metrics in names.items() if metrics}

    def __str__(self) -> str:
        asr = f"{percent(self.triggered.accuracy):.2f} %" if self.triggered else "not known (no trigger)"
        cross = f", with other images' triggers {percent(self.cross.accuracy):.2f} %" if self.cross else ""
        return f"C-Acc {percent(self.clean.accuracy):.2f} %, ASR {asr}{cross}"


def percent(share: float) -> float:
    """Return a share of 1 in percent."""
    return 100 * share


def inference_copy(network: nn.Module, precision: torch.dtype) -> nn.Module:
    """Return a copy for evaluation: BatchNorms folded into convolutions, weights in ``precision``, channels last."""
    return fuse(network.eval()).to(precision, memory_format=torch.channels_last)


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    image_set: ImageSet,
    normalization: Normalization,
    precision: torch.dtype,
    batch_size: int = EVALUATION_BATCH,
) -> Metrics:
    """Measure an inference copy; the network's own batches wait for the device only once, at the end.

    Raises:
        ZeroDivisionError: the set is empty.
    """
    loss = torch.zeros((), dtype=torch.float64, device=image_set.images.device)
    correct = torch.zeros_like(loss)
    for images, labels in zip(image_set.images.split(batch_size), image_set.labels.split(batch_size), strict=True):
        logits = network(normalize(images, normalization).to(precision)).float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return Metrics(loss.item() / len(image_set), correct.item() / len(image_set))


class Evaluator:
    """Measures networks on the test sets, named by role.

    Args:
        clean_test: the clean test images.
        trigger: the attacker's trigger; None where it is unknown.
        defender: the defender's clean images; None where there is no defender yet.
        normalization: of the network's input.
        precision: data type of the evaluation.
        batch_size: images in an evaluation batch; changes the speed, not the result.

    Raises:
        InputError: the trigger does not fit the test images.
    """

    def __init__(
        self,
        clean_test: ImageSet,
        trigger: Trigger | None,
        defender: ImageSet | None,
        normalization: Normalization,
        precision: torch.dtype,
        batch_size: int = EVALUATION_BATCH,
    ):
        self.clean_test = clean_test
        self.triggered_test = triggered_test_set(clean_test, trigger) if trigger else None
        self.defender = defender
        self.normalization = normalization
        self.precision = precision
        self.batch_size = batch_size

    def __call__(self, network: nn.Module) -> Report:
        """Measure one network on every set that is known.

        Raises:
            InputError: the loss is NaN or infinite, as after a training that diverged.
        """
        copy = inference_copy(network, self.precision)
        clean, triggered, defender = (
            evaluate(copy, image_set, self.normalization, self.precision, self.batch_size) if image_set else None
            for image_set in (self.clean_test, self.triggered_test, self.defender)
        )
        if not math.isfinite(clean.loss):
            raise InputError(f"the network's loss on clean images is {clean.loss}: it diverged; try a lower --lr")
        return Report(clean, triggered, defender)
