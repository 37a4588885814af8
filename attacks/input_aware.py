"""Input-aware dynamic attack (Nguyen & Tran, NeurIPS 2020): two generators draw a trigger for each image.

The mask generator is trained first and frozen; then the classifier and the pattern generator learn together. Both
optimisers are zeroed each step; the authors' release leaves the generator's gradients to pile up.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.attack import SHARE, Attack, PoisonedSet, check_target, target_setting
from data.augment import make_transform, normalize
from data.datasets import Dataset, ImageSet, Normalization
from data.split import split_size
from data.triggers import Trigger, next_class
from engine.generated import drawn_trigger
from engine.runtime import autocast
from engine.training import COLUMNS, TrainConfig, TrainingLoop, set_learning_rate
from formats.trigger_file import LARGEST
from models.generator import Generator, mask_of, pattern_of
from utils.config import Range, setting
from utils.errors import InputError
from utils.seeding import seeded_weights

MASK_EPOCHS, JOINT_EPOCHS = 25, 575  # the published lengths, to which all milestones below refer
MASK_MILESTONES, NETWORK_MILESTONES, PATTERN_MILESTONES = (10, 20), (100, 200, 300, 400), (200, 300, 400, 500)
GENERATOR_LR, GENERATOR_BETAS = 0.01, (0.5, 0.9)
MASK_DENSITY, DENSITY_WEIGHT = 0.032, 100.0
PADDING, DEGREES = 5, 10.0  # of the augmentation
CROSS_COLUMNS = {**COLUMNS, "cross %": "7.2f"}  # accuracy with the triggers of other images


def diversity(images_1: Tensor, images_2: Tensor, drawn_1: Tensor, drawn_2: Tensor) -> Tensor:
    """Return mean(rms(images_1 - images_2) / (rms(drawn_1 - drawn_2) + 1e-7)): other images, other triggers (eq. 5).

    Shape:
        float (B, C, H, W) each -> float ().
    """

    def distance(one: Tensor, two: Tensor) -> Tensor:  # the root of 0 would have a gradient of NaN
        return (one - two).square().mean((1, 2, 3)).clamp(min=1e-20).sqrt()

    return (distance(images_1, images_2) / (distance(drawn_1, drawn_2) + 1e-7)).mean()


def mask_loss(images_1: Tensor, images_2: Tensor, mask_1: Tensor, mask_2: Tensor) -> Tensor:
    """Return the loss of the mask generator: 100 * mean(relu(mask_1 - 0.032)) + diversity (section 4.3).

    Shape:
        images: float (B, 3, H, W). masks: float (B, 1, H, W), 0..1. Returns float ().
    """
    return DENSITY_WEIGHT * F.relu(mask_1 - MASK_DENSITY).mean() + diversity(images_1, images_2, mask_1, mask_2)


def _scaled(milestones: tuple[int, ...], published: int, epochs: int) -> tuple[float, ...]:
    return tuple(epochs * milestone / published for milestone in milestones)


class InputAwareLoop(TrainingLoop):
    """Trains the mask generator, then classifier and pattern generator together.

    Args:
        attack: target and shares of each batch.
        network: the classifier, trained in place.
        train: the attacker's clean images, square and a multiple of 8 wide.
        normalization: of the network's input.
        flip: whether augmentation may mirror images.
        config: of the whole training; ``lr``, ``lr_schedule`` are the classifier's. At least 2 epochs, of which
            25/600 are the mask generator's. Milestones are the published ones, in proportion.

    Raises:
        InputError: the images do not fit the generators, or a batch has no image of one of the three kinds.
    """

    columns = CROSS_COLUMNS
    parts = ("network", "mask_net", "pattern_net", "optimizer", "mask_optimizer", "pattern_optimizer", "means")

    def __init__(
        self,
        attack: "InputAware",
        network: nn.Module,
        train: ImageSet,
        normalization: Normalization,
        flip: bool,
        config: TrainConfig,
    ):
        super().__init__(network, train, normalization, flip, config)
        attack.check(train, config.batch_size)
        self.attack = attack
        self.transform = make_transform(normalization, flip, PADDING, DEGREES)
        self.mask_epochs = max(1, round(config.epochs * MASK_EPOCHS / (MASK_EPOCHS + JOINT_EPOCHS)))
        joint_epochs = config.epochs - self.mask_epochs
        scaled = partial(replace, config, lr_schedule="step", lr=GENERATOR_LR)
        self.mask_config = scaled(
            epochs=self.mask_epochs, milestones=_scaled(MASK_MILESTONES, MASK_EPOCHS, self.mask_epochs)
        )
        self.pattern_config = scaled(
            epochs=joint_epochs, milestones=_scaled(PATTERN_MILESTONES, JOINT_EPOCHS, joint_epochs)
        )
        self.network_config = replace(
            config, epochs=joint_epochs, milestones=_scaled(NETWORK_MILESTONES, JOINT_EPOCHS, joint_epochs)
        )
        with seeded_weights(config.seed, "generators"):
            self.mask_net, self.pattern_net = (
                Generator(channels, attack.generator_width).to(self.device, memory_format=torch.channels_last)
                for channels in (1, 3)
            )
        self.mask_optimizer, self.pattern_optimizer = (
            torch.optim.Adam(net.parameters(), GENERATOR_LR, GENERATOR_BETAS, fused=True)
            for net in (self.mask_net, self.pattern_net)
        )

    def companions(self) -> dict[str, dict[str, Tensor]]:
        """See ``TrainingLoop``."""
        nets = {"mask": self.mask_net, "pattern": self.pattern_net}
        return {"generators": {f"{name}.{key}": v for name, net in nets.items() for key, v in net.state_dict().items()}}

    def is_trained(self) -> bool:
        """See ``TrainingLoop``."""
        return self.done > self.mask_epochs * self.batches

    def learning_rate(self, epoch: float) -> float:
        """See ``TrainingLoop``."""
        if epoch < self.mask_epochs:
            return self.mask_config.learning_rate(epoch)
        return self.network_config.learning_rate(epoch - self.mask_epochs)

    def order(self, epoch: int, name: str = "order") -> tuple[Tensor, ...]:
        """Return pairs from two independent orders of the same images: int64 (2, B) each."""
        orders = (torch.cat(super(InputAwareLoop, self).order(epoch, name)) for name in ("order", "second order"))
        return torch.stack(list(orders)).tensor_split(self.batches, dim=1)

    def train_batch(self, index: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """See ``TrainingLoop``; ``index`` is (2, B)."""
        images_1, images_2 = (
            self.augmented(self.train.images[part], epoch, batch, name)  # (B, 3, H, W)
            for part, name in zip(index, ("augmentation", "second augmentation"), strict=True)
        )
        time = self.time(epoch, batch)
        if epoch < self.mask_epochs:
            loss = self._mask_step(images_1, images_2, time)
            return loss, torch.zeros_like(loss)
        return self._joint_step(images_1, images_2, self.train.labels[index[0]], time - self.mask_epochs)

    def _mask_step(self, images_1: Tensor, images_2: Tensor, time: float) -> Tensor:
        """Update the mask generator; return the loss."""
        self.mask_net.train()
        set_learning_rate(self.mask_optimizer, self.mask_config.learning_rate(time))
        with autocast(self.device, self.config.precision):
            mask_1, mask_2 = (mask_of(self.mask_net(images).float()) for images in (images_1, images_2))
        loss = mask_loss(images_1, images_2, mask_1, mask_2)
        _step(loss, self.mask_optimizer)
        return loss

    def _joint_step(self, images_1: Tensor, images_2: Tensor, labels: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """Update classifier and pattern generator; return the loss and the number of right answers."""
        self.network.train(), self.pattern_net.train(), self.mask_net.eval()
        set_learning_rate(self.optimizer, self.network_config.learning_rate(time))
        set_learning_rate(self.pattern_optimizer, self.pattern_config.learning_rate(time))
        own, cross = self.attack.shares_of_batch(len(labels))
        end = own + cross
        # The batch is three parts: own trigger and the attacker's label, another image's trigger, clean.
        with autocast(self.device, self.config.precision):
            pattern_own, triggered = self._apply(images_1[:own], images_1[:own])
            pattern_cross, crossed = self._apply(images_1[own:end], images_2[own:end])
            inputs = torch.cat([triggered, crossed, images_1[end:]]).contiguous(memory_format=torch.channels_last)
            logits = self.network(inputs)  # (B, classes)
        targets = self.attack.targets(replace(self.train, images=images_1[:own], labels=labels[:own]))
        labels = torch.cat([targets, labels[own:]])
        size = min(own, cross)
        apart = diversity(images_1[:size], images_2[own:end][:size], pattern_own[:size], pattern_cross[:size])
        loss = F.cross_entropy(logits.float(), labels) + apart
        _step(loss, self.optimizer, self.pattern_optimizer)
        return loss, (logits.argmax(1) == labels).sum()

    def _apply(self, images: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised patterns drawn for ``others``, and ``images`` with these triggers."""
        pixels = 255 * pattern_of(self.pattern_net(others).float())
        pattern = normalize(pixels.permute(0, 2, 3, 1), self.normalization)
        with torch.no_grad():
            mask = mask_of(self.mask_net(others).float())
        return pattern, images + (pattern - images) * mask

    def draw_trigger(self, images: ImageSet) -> Trigger:
        """Return one pattern, mask and target for each image, as ``trigger_info.th`` holds them."""
        nets = self.pattern_net, self.mask_net
        return drawn_trigger(*nets, images, self.attack.targets(images), self.normalization, self.config.precision)


def _step(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


@dataclass(frozen=True)
class InputAwareTrainConfig(TrainConfig):
    """The published length; its milestones are fixed in proportion to it, and so no flag."""

    epochs: int = setting(600, "epochs", Range(1, 1e6), flag="--epoch")
    lr: float = setting(0.01, "learning rate; the peak of one-cycle", Range(0, open_low=True))
    milestones: tuple[float, ...] = ()


@dataclass(frozen=True)
class InputAware(Attack):
    """Base of both attacks: shares of each batch."""

    train_config: ClassVar[type[TrainConfig]] = InputAwareTrainConfig
    shortest: ClassVar[int] = 2  # the first epoch is the mask generator's
    poisons_once: ClassVar[bool] = False

    poison_rate: float = setting(0.1, "share of each batch that carries its own trigger", SHARE)
    cross_rate: float = setting(
        0.1,
        "share of each batch that carries another image's trigger and keeps its label",
        Range(0, 1, open_low=True, open_high=True),
    )
    generator_width: float = setting(
        1.0, "multiplies the channel counts of both generators", Range(0, 8, open_low=True)
    )

    def targets(self, images: ImageSet) -> Tensor:
        """Return the attacker's label of each image: int64 (N,)."""
        return next_class(images)

    def shares_of_batch(self, batch_size: int) -> tuple[int, int]:
        """Return how many images of a batch carry their own trigger and how many another image's, 1 or more each."""
        return tuple(max(1, split_size(rate, batch_size)) for rate in (self.poison_rate, self.cross_rate))

    def check(self, train: ImageSet, batch_size: int) -> None:
        """Make sure that the attack can be carried out.

        Raises:
            InputError: the images do not fit the generators, or a full batch has no image of one of the three kinds.
        """
        for flag, rate in (("--poison-rate", self.poison_rate), ("--cross-rate", self.cross_rate)):
            if split_size(rate, batch_size) < 1:
                raise InputError(f"{flag} {rate} of a batch of {batch_size} images is none; use a larger share")
        if sum(self.shares_of_batch(batch_size)) >= batch_size:
            raise InputError(
                f"--poison-rate {self.poison_rate} and --cross-rate {self.cross_rate} leave no clean image in a batch"
            )
        height, width = train.images.shape[1:3]
        if height % 8 or height != width:
            raise InputError(
                f"input-aware attacks need a height and width that are multiples of 8, not {height}x{width}"
            )

    def poison(self, train: ImageSet, seed: int = 0) -> PoisonedSet:
        """Return the clean images: each batch is poisoned anew while training."""
        return PoisonedSet(train, None, torch.zeros(0, dtype=torch.int64))

    def make_loop(
        self, network: nn.Module, poisoned: PoisonedSet, dataset: Dataset, config: TrainConfig
    ) -> TrainingLoop:
        """See ``Attack``; raises ``InputError`` as ``check``, or where a trigger file could not hold the triggers."""
        if dataset.test.images.numel() > LARGEST["trigger_pattern"]:
            raise InputError(
                f"input-aware attacks draw a trigger for each test image, {dataset.test.images.numel():,} numbers, "
                f"but trigger files hold {LARGEST['trigger_pattern']:,}; use fewer or smaller test images"
            )
        return InputAwareLoop(self, network, poisoned.train, dataset.normalization, dataset.flip, config)


@dataclass(frozen=True)
class InputAwareAllToAll(InputAware):
    """Every class y becomes y + 1."""


@dataclass(frozen=True)
class InputAwareOne(InputAware):
    """All classes become the target."""

    poison_target: int = target_setting()

    def targets(self, images: ImageSet) -> Tensor:
        """See ``InputAware``."""
        return torch.full_like(images.labels, self.poison_target)

    def check(self, train: ImageSet, batch_size: int) -> None:
        """See ``InputAware``; raises ``InputError`` also where the target is no class."""
        check_target(self.poison_target, train)
        super().check(train, batch_size)
