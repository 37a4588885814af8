"""What every attack is given and what it returns."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data.datasets import ImageSet
from data.errors import InputError
from data.seeding import seeded_generator
from data.split import split_size
from data.triggers import Trigger


@dataclass(frozen=True)
class AttackConfig:
    """The attacker's choices.

    Attributes:
        target: the class that the trigger shall lead to.
        rate: share of the non-target training images that are poisoned, 0..1.
        alpha: opacity of the trigger, 0..1.
        seed: decides which images are poisoned and what noise is drawn.
        folder: a published poisoned set, for attacks that read one.
    """

    target: int
    rate: float
    alpha: float
    seed: int
    folder: str | None = None


@dataclass(frozen=True)
class PoisonedSet:
    """The attacker's training set, in the order of ``train_index``, and the trigger."""

    train: ImageSet
    trigger: Trigger


@dataclass(frozen=True)
class Attack:
    """One entry of the registry.

    Attributes:
        poison: ``poison(full_train, train_index, config) -> PoisonedSet``; ``full_train`` are all training images,
            ``train_index`` int64 those that the attacker holds.
        default_alpha: the attack's own opacity.
        needs_folder: whether it reads a published set (``--clb-dir``), which then fixes the poison rate.
    """

    poison: Callable[[ImageSet, Tensor, AttackConfig], PoisonedSet]
    default_alpha: float
    needs_folder: bool = False


def poison_and_relabel(full_train: ImageSet, train_index: Tensor, config: AttackConfig, trigger: Trigger) -> ImageSet:
    """Stamp ``trigger.data_index`` and give these images the target's label; the rest stays."""
    train = full_train[train_index]
    position = torch.isin(train_index, trigger.data_index).nonzero().flatten()
    train.images[position] = trigger.stamp(train.images[position])
    train.labels[position] = config.target
    return train


def draw_poisoned_index(full_train: ImageSet, train_index: Tensor, config: AttackConfig) -> Tensor:
    """Draw int(rate * M) of the M non-target training images; returns int64 indices into ``full_train``.

    Raises:
        InputError: the rate is above 0 and yet so small that no image would be poisoned.
    """
    candidates = train_index[full_train.labels[train_index].cpu() != config.target]
    count = split_size(config.rate, len(candidates))
    if count < 1:
        raise InputError(f"--poison-rate {config.rate} of {len(candidates)} non-target images poisons none; use more")
    order = torch.randperm(len(candidates), generator=seeded_generator(config.seed, "poisoned images"))
    return candidates[order[:count]]
