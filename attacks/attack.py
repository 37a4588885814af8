"""What every attack is given and what it returns."""

from argparse import Namespace
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from data.datasets import Dataset, ImageSet
from data.errors import InputError
from data.seeding import seeded_generator
from data.split import split_size
from data.triggers import Trigger
from utils.run import Run
from utils.runtime import Runtime
from utils.training import SgdTrainer, TrainConfig, Trainer

PAPER_TRAINING = {"epoch": 200, "lr": 0.1, "schedule": [100, 150]}


@dataclass(frozen=True)
class AttackContext:
    """What an attack works with.

    Attributes:
        dataset: the clean dataset; attacks never change it.
        train_index: int64; the training images that the attacker holds.
        permutation: int64 (N,); the split, of which ``train_index`` is a part.
        options: the command line of step 1, with the attack's own defaults filled in.
        run: the run, for progress and its folder.
        runtime: where to compute.
    """

    dataset: Dataset
    train_index: Tensor
    permutation: Tensor
    options: Namespace
    run: Run
    runtime: Runtime


@dataclass(frozen=True)
class PoisonedSet:
    """The attacker's training set and the trigger.

    Attributes:
        train: what the network is trained on, in the order of ``AttackContext.train_index`` unless it was read.
        trigger: None where there is none, or where it is learnt with the network.
    """

    train: ImageSet
    trigger: Trigger | None

    @property
    def count(self) -> int | None:
        """Number of poisoned images; None where it is not known, or differs from batch to batch."""
        return len(self.trigger.data_index) or None if self.trigger else None


def _no_contradiction(options: Namespace) -> frozenset[str]:
    """The check of an attack whose flags go with each other in any way."""
    return frozenset()


def _sgd_trainer(network: nn.Module, poisoned: PoisonedSet, config: TrainConfig, context: AttackContext) -> Trainer:
    return SgdTrainer(network, poisoned.train, poisoned.trigger, context.dataset, config)


@dataclass(frozen=True)
class Attack:
    """One entry of the registry.

    Attributes:
        poison: makes the poisoned set; raises ``InputError`` where that cannot be done.
        options: the flags of step 1 that the attack takes, by name, with its defaults. Any other attack's flag
            is refused.
        training: the same for the flags of the training; the default is the paper's.
        check: is given the flags before defaults are filled in; raises ``ValueError`` where they contradict each
            other, and returns the names of those that shall stay unset.
        make_trainer: for attacks that train more than the network.
    """

    poison: Callable[[AttackContext], PoisonedSet]
    options: dict[str, Any]
    training: dict[str, Any] = field(default_factory=PAPER_TRAINING.copy)
    check: Callable[[Namespace], Collection[str]] = _no_contradiction
    make_trainer: Callable[[nn.Module, PoisonedSet, TrainConfig, AttackContext], Trainer] = _sgd_trainer


def target_class(context: AttackContext) -> int:
    """Return the target class.

    Raises:
        InputError: the dataset has no such class.
    """
    target, dataset = context.options.poison_target, context.dataset
    if target >= dataset.num_classes:
        raise InputError(f"--poison-target {target}: {dataset.name} has the classes 0..{dataset.num_classes - 1}")
    return target


def next_class(labels: Tensor, num_classes: int) -> Tensor:
    """Return the all-to-all target of each label: (y + 1) mod classes (Gu et al. 2017)."""
    return (labels + 1) % num_classes


def draw_poisoned_index(context: AttackContext, candidates: Tensor) -> Tensor:
    """Draw int(rate * M) of the attacker's images.

    Args:
        context: with ``options.poison_rate`` above 0.
        candidates: bool (N,) over all training images; M of the attacker's have it set.

    Returns:
        int64 indices into the dataset's training images.

    Raises:
        InputError: the rate is so small that no image would be poisoned.
    """
    rate = context.options.poison_rate
    held = context.train_index[candidates.cpu()[context.train_index]]
    count = split_size(rate, len(held))
    if count < 1:
        raise InputError(f"--poison-rate {rate} of {len(held)} candidate images poisons none; use more")
    order = torch.randperm(len(held), generator=seeded_generator(context.options.seed, "poisoned images"))
    return held[order[:count]]


def stamp_and_relabel(context: AttackContext, trigger: Trigger, labels: Tensor | None = None) -> PoisonedSet:
    """Stamp ``trigger.data_index``; the rest stays.

    Args:
        context: the attacker's images.
        trigger: one pattern for all images.
        labels: int64 (N,), the new label of every training image; None keeps the labels.
    """
    train = context.dataset.train[context.train_index]
    position = torch.isin(context.train_index, trigger.data_index).nonzero().flatten()
    train.images[position] = trigger.stamp(train.images[position])
    if labels is not None:
        train.labels[position] = labels.to(train.labels.device)[context.train_index[position]]
    return PoisonedSet(train, trigger)


def poison_all_to_one(context: AttackContext, pattern: Tensor, mask: Tensor) -> PoisonedSet:
    """Stamp a share of the images of other classes and label them as the target.

    Args:
        context: of the attack.
        pattern, mask: the trigger, uint8 (1, H, W, C or 1) and floating (1, H, W, 1).

    Raises:
        InputError: the target is no class, or the poison rate leaves no image to poison.
    """
    target, labels = target_class(context), context.dataset.train.labels
    index = draw_poisoned_index(context, labels != target)
    trigger = Trigger(pattern, mask, context.options.trigger_alpha, torch.tensor([target]), index)
    return stamp_and_relabel(context, trigger, torch.full_like(labels, target))
