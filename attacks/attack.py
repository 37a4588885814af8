"""What every attack is: a config that poisons a training set."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from data.datasets import Dataset, ImageSet
from data.split import split_size
from data.triggers import Trigger
from engine.runtime import Runtime
from engine.training import SgdLoop, TrainConfig, TrainingLoop
from models import ModelConfig
from utils.config import Config, Range, setting
from utils.errors import InputError
from utils.seeding import seeded_generator

A = TypeVar("A", bound="Attack")
SHARE = Range(0, 1, open_low=True)


@dataclass(frozen=True)
class PoisonedSet:
    """The attacker's training set and the trigger.

    Attributes:
        train: what the network is trained on.
        trigger: None where there is none, or where it is learnt with the network.
        index: int64; the poisoned ones among ``train``; empty where that is not known or differs between batches.
        origin: int64; which of the dataset's training images each of ``train`` was made from; None where ``train`` has
            the order of the clean images given.
    """

    train: ImageSet
    trigger: Trigger | None
    index: Tensor
    origin: Tensor | None = None


@dataclass(frozen=True)
class Workspace:
    """What step 1 lends an attack that needs more than images: files, a device, time.

    Attributes:
        dataset: the clean dataset; indices in files refer to its training set.
        held: int64; the training images that the attacker holds.
        split: digest of the permutation of which they are a part.
        seed: of the run.
        folder: of the run.
        overwrite: whether older results in it may go.
        runtime: where to compute.
        model: the network that will be trained.
        track: shows the progress of some steps, given their number, how many are done, a title and a unit.
    """

    dataset: Dataset
    held: Tensor
    split: str
    seed: int
    folder: Path
    overwrite: bool
    runtime: Runtime
    model: ModelConfig
    track: Callable[..., Iterator[Any]]

    @property
    def train(self) -> ImageSet:
        """The attacker's images."""
        return self.dataset.train[self.held]

    def data_index(self, poisoned: PoisonedSet) -> Tensor:
        """Return which of the dataset's training images were poisoned: int64."""
        return (self.held if poisoned.origin is None else poisoned.origin)[poisoned.index]


@dataclass(frozen=True)
class Attack(Config):
    """Base of all attacks: the settings are its fields, and ``poison`` carries it out.

    >>> BadNets(poison_rate=0.05).poison(train, seed=0)

    Attributes:
        train_config: the settings of the training, with the attack's own defaults.
        shortest: epochs that a training needs at least.
        poisons_once: whether there is a poisoned set to export.

    Raises:
        ValueError: a setting is out of range.
    """

    train_config: ClassVar[type[TrainConfig]] = TrainConfig
    shortest: ClassVar[int] = 1
    poisons_once: ClassVar[bool] = True

    @classmethod
    def from_given(cls: type[A], given: dict[str, Any]) -> A:
        """Make the attack from the flags that were given, by field; raises ``ValueError`` where they contradict."""
        return cls(**given)

    def poison(self, train: ImageSet, seed: int = 0) -> PoisonedSet:
        """Poison a training set, which itself stays as it is.

        Args:
            train: the attacker's clean images.
            seed: decides which images are poisoned.

        Raises:
            InputError: the target is no class, or no image would be poisoned.
        """
        raise NotImplementedError

    def carry_out(self, workspace: Workspace) -> PoisonedSet:
        """Poison the attacker's images in step 1; raises as ``poison``."""
        return self.poison(workspace.train, workspace.seed)

    def make_loop(
        self, network: nn.Module, poisoned: PoisonedSet, dataset: Dataset, config: TrainConfig
    ) -> TrainingLoop:
        """Return the training of a network on what ``poison`` returned."""
        return SgdLoop(network, poisoned.train, dataset.normalization, dataset.flip, config)


def target_setting() -> Any:
    """Declare the target class of an attack."""
    return setting(0, "class the trigger should produce", Range(0))


def opacity_setting(default: float) -> Any:
    """Declare the opacity of a trigger."""
    return setting(default, "opacity of the trigger; 1 is fully opaque", SHARE)


def check_target(target: int, train: ImageSet) -> None:
    """Make sure that the target is a class.

    Raises:
        InputError: it is none.
    """
    if target >= train.num_classes:
        raise InputError(f"--poison-target {target}: there are only the classes 0..{train.num_classes - 1}")


def draw_poisoned(candidates: Tensor, rate: float, seed: int) -> Tensor:
    """Draw int(rate * M) of the attacker's images.

    Args:
        candidates: bool (N,), M of them set.
        rate: above 0, at most 1.
        seed: decides which.

    Returns:
        int64 positions, on the CPU.

    Raises:
        InputError: the rate is so small that no image would be poisoned.
    """
    possible = candidates.nonzero().flatten().cpu()
    count = split_size(rate, len(possible))
    if count < 1:
        raise InputError(f"--poison-rate {rate} of {len(possible)} candidate images poisons none; use a larger share")
    order = torch.randperm(len(possible), generator=seeded_generator(seed, "poisoned images"))
    return possible[order[:count]]


def stamp_and_relabel(train: ImageSet, trigger: Trigger, index: Tensor, labels: Tensor | None = None) -> PoisonedSet:
    """Stamp some images; the rest stays.

    Args:
        train: the attacker's clean images.
        trigger: one pattern for all images.
        index: int64; which.
        labels: int64 (N,), the new label of every image; None keeps the labels.
    """
    images, new = train.images.clone(), train.labels.clone()
    index_there = index.to(images.device)
    images[index_there] = trigger.stamp(images[index_there])
    if labels is not None:
        new[index_there] = labels[index_there]
    return PoisonedSet(ImageSet(images, new, train.num_classes), trigger, index)


@dataclass(frozen=True)
class OneTarget(Attack):
    """Base of attacks that stamp a share of the images of other classes and label them as the target."""

    poison_target: int = target_setting()
    poison_rate: float = setting(0.05, "share of the non-target training images that is poisoned", SHARE)
    trigger_alpha: float = opacity_setting(1.0)

    def pattern(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return the trigger, uint8 (1, H, W, C or 1), and its mask, floating (1, H, W, 1)."""
        raise NotImplementedError

    def poison(self, train: ImageSet, seed: int = 0) -> PoisonedSet:
        """See ``Attack``."""
        check_target(self.poison_target, train)
        pattern, mask = self.pattern(*train.images.shape[1:3])
        index = draw_poisoned(train.labels != self.poison_target, self.poison_rate, seed)
        trigger = Trigger(pattern, mask, self.trigger_alpha, torch.tensor([self.poison_target]))
        return stamp_and_relabel(train, trigger, index, torch.full_like(train.labels, self.poison_target))
