"""Input-aware dynamic attack (Nguyen & Tran, NeurIPS 2020): two generators draw a trigger for each image.

The mask generator is trained first and frozen; then the classifier and the pattern generator learn together. Both
optimisers are zeroed each step; the authors' release leaves the generator's gradients to pile up.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.attack import AttackContext, PoisonedSet, next_class, target_class
from data.augment import normalize, random_crop_flip, random_rotate
from data.datasets import Dataset, ImageSet
from data.errors import InputError
from data.seeding import seeded_generator, seeded_weights
from data.split import split_size
from data.triggers import Trigger
from models.generator import Generator
from utils.evaluation import EVALUATION_BATCH, Evaluator, Report, evaluate, inference_copy
from utils.run import announce
from utils.training import COLUMNS, TrainConfig, TrainState, epoch_order, make_optimizer, set_learning_rate

MASK_EPOCHS, JOINT_EPOCHS = 25, 575  # the published lengths, to which all milestones below refer
MASK_MILESTONES, NETWORK_MILESTONES, PATTERN_MILESTONES = (10, 20), (100, 200, 300, 400), (200, 300, 400, 500)
GENERATOR_LR, GENERATOR_BETAS = 0.01, (0.5, 0.9)
MASK_DENSITY, DENSITY_WEIGHT = 0.032, 100.0
PADDING, DEGREES = 5, 10.0  # of the augmentation
CROSS_COLUMNS = {**COLUMNS, "cross %": "7.2f"}  # accuracy with the triggers of other images


def pattern_of(output: Tensor) -> Tensor:
    """Squash the pattern generator's output to pixels: float (B, 3, H, W) -> (B, 3, H, W), 0..1."""
    return torch.tanh(output) / 2 + 0.5


def mask_of(output: Tensor) -> Tensor:
    """Squash the mask generator's output to nearly 0 or 1: float (B, 1, H, W) -> (B, 1, H, W), 0..1."""
    return torch.tanh(20 * pattern_of(output) - 10) / 2 + 0.5


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


def shares_of_batch(poison_rate: float, cross_rate: float, batch_size: int) -> tuple[int, int]:
    """Return how many images of a batch carry their own trigger and how many another image's, 1 or more of each."""
    return tuple(max(1, split_size(rate, batch_size)) for rate in (poison_rate, cross_rate))


def poison_input_aware(context: AttackContext) -> PoisonedSet:
    """Return the clean images; each batch is poisoned anew while training.

    Raises:
        InputError: the target is no class, or a full batch has no image with its own trigger, with another image's
            trigger, or without any.
    """
    options = context.options
    if options.poison_target is not None:
        target_class(context)
    for flag, rate in (("--poison-rate", options.poison_rate), ("--cross-rate", options.cross_rate)):
        if split_size(rate, options.batch_size) < 1:
            raise InputError(f"{flag} {rate} of a batch of {options.batch_size} images is none; use more")
    own, cross = shares_of_batch(options.poison_rate, options.cross_rate, options.batch_size)
    if own + cross >= options.batch_size:
        raise InputError(
            f"--poison-rate {options.poison_rate} and --cross-rate {options.cross_rate} leave no clean image in a batch"
        )
    announce(
        f"{options.poison_type}: {own} of {options.batch_size} images in each batch with their own trigger "
        f"({100 * own / options.batch_size:.2f} %), {cross} with another image's"
    )
    return PoisonedSet(context.dataset.train[context.train_index], None)


def _scaled(milestones: tuple[int, ...], published: int, epochs: int) -> tuple[float, ...]:
    return tuple(epochs * milestone / published for milestone in milestones)


class InputAwareTrainer:
    """Trains the mask generator, then classifier and pattern generator together; see ``utils.training.Trainer``.

    Args:
        network: the classifier, trained in place.
        train: the attacker's clean images.
        dataset: its test set and normalisation.
        config: of the whole training; ``lr``, ``lr_schedule`` are the classifier's. At least 2 epochs, of which
            25/600 are the mask generator's. Milestones are the published ones, in proportion.
        target_of: the attacker's label of each true label, int64 (B,) -> int64 (B,).
        poison_rate, cross_rate: shares of each batch that carry their own and another image's trigger, 0..1.
    """

    columns = CROSS_COLUMNS

    def __init__(
        self,
        network: nn.Module,
        train: ImageSet,
        dataset: Dataset,
        config: TrainConfig,
        target_of: Callable[[Tensor], Tensor],
        poison_rate: float,
        cross_rate: float,
    ):
        device = train.images.device
        self.network, self.train, self.dataset, self.config = network, train, dataset, config
        self.target_of, self.poison_rate, self.cross_rate = target_of, poison_rate, cross_rate
        self.trigger: Trigger | None = None
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
                Generator(channels).to(device, memory_format=torch.channels_last) for channels in (1, 3)
            )
        self.optimizer = make_optimizer(network, config)
        self.mask_optimizer, self.pattern_optimizer = (
            torch.optim.Adam(net.parameters(), GENERATOR_LR, GENERATOR_BETAS, fused=True)
            for net in (self.mask_net, self.pattern_net)
        )

    # What a resumed run needs, by the names of the attributes.
    PARTS = ("network", "mask_net", "pattern_net", "optimizer", "mask_optimizer", "pattern_optimizer")

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])

    def companions(self) -> dict[str, dict[str, Tensor]]:
        nets = {"mask": self.mask_net, "pattern": self.pattern_net}
        return {"generators": {f"{name}.{key}": v for name, net in nets.items() for key, v in net.state_dict().items()}}

    def learning_rate(self, epoch: float) -> float:
        if epoch < self.mask_epochs:
            return self.mask_config.learning_rate(epoch)
        return self.network_config.learning_rate(epoch - self.mask_epochs)

    def train_epoch(self, state: TrainState) -> Iterator[int]:
        """See ``Trainer``. Two independent orders of the same images give the pairs."""
        config, device = self.config, self.train.images.device
        count = -(-len(self.train) // config.batch_size)
        orders = (epoch_order(config, state.epoch, len(self.train), device, name) for name in ("order", "second order"))
        pairs = list(zip(*(order.tensor_split(count) for order in orders), strict=True))
        while state.batch < count:
            first, second = (self.train[index] for index in pairs[state.batch])
            images = [
                self._augment(
                    batch.images, seeded_generator(config.seed, name, state.epoch, state.batch, device=device)
                )
                for name, batch in (("augmentation", first), ("second augmentation", second))
            ]
            time = state.epoch + (state.batch + 0.5) / count
            if state.epoch < self.mask_epochs:
                loss, correct = self._mask_step(*images, time), 0
            else:
                loss, correct = self._joint_step(*images, first.labels, time - self.mask_epochs)
            state.count(loss, len(first), correct)
            yield len(first)

    def _augment(self, images: Tensor, generator: torch.Generator) -> Tensor:
        images = random_rotate(random_crop_flip(images, generator, PADDING), generator, DEGREES)
        return normalize(images, self.dataset.normalization)

    def _autocast(self) -> torch.autocast:
        precision = self.config.precision
        return torch.autocast(self.train.images.device.type, precision, precision != torch.float32)

    def _mask_step(self, images_1: Tensor, images_2: Tensor, time: float) -> Tensor:
        """Update the mask generator; return the loss."""
        self.mask_net.train()
        set_learning_rate(self.mask_optimizer, self.mask_config.learning_rate(time))
        with self._autocast():
            mask_1, mask_2 = (mask_of(self.mask_net(images).float()) for images in (images_1, images_2))
        loss = mask_loss(images_1, images_2, mask_1, mask_2)
        _step(loss, self.mask_optimizer)
        return loss

    def _joint_step(self, images_1: Tensor, images_2: Tensor, labels: Tensor, time: float) -> tuple[Tensor, Tensor]:
        """Update classifier and pattern generator; return the loss and the number of right answers."""
        self.network.train(), self.pattern_net.train(), self.mask_net.eval()
        set_learning_rate(self.optimizer, self.network_config.learning_rate(time))
        set_learning_rate(self.pattern_optimizer, self.pattern_config.learning_rate(time))
        own, cross = shares_of_batch(self.poison_rate, self.cross_rate, len(labels))
        end = own + cross
        with self._autocast():
            pattern_own, triggered = self._apply(images_1[:own], images_1[:own])
            pattern_cross, crossed = self._apply(images_1[own:end], images_2[own:end])
            inputs = torch.cat([triggered, crossed, images_1[end:]]).contiguous(memory_format=torch.channels_last)
            logits = self.network(inputs)
        labels = torch.cat([self.target_of(labels[:own]), labels[own:]])
        size = min(own, cross)
        apart = diversity(images_1[:size], images_2[own:end][:size], pattern_own[:size], pattern_cross[:size])
        loss = F.cross_entropy(logits.float(), labels) + apart
        _step(loss, self.optimizer, self.pattern_optimizer)
        return loss, (logits.argmax(1) == labels).sum()

    def _apply(self, images: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised patterns drawn for ``others``, and ``images`` with these triggers."""
        pixels = 255 * pattern_of(self.pattern_net(others).float())
        pattern = normalize(pixels.permute(0, 2, 3, 1), self.dataset.normalization)
        with torch.no_grad():
            mask = mask_of(self.mask_net(others).float())
        return pattern, images + (pattern - images) * mask

    def evaluate(self, epoch: int) -> Report | None:
        if epoch <= self.mask_epochs:
            return None
        test, normalization, precision = self.dataset.test, self.dataset.normalization, self.config.precision
        self.trigger = self.draw_trigger(test)
        report = Evaluator(test, self.trigger, None, normalization, precision)(self.network)
        copy = inference_copy(self.network, precision)
        return replace(report, cross=evaluate(copy, self.crossed(test), normalization, precision))

    def crossed(self, images: ImageSet) -> ImageSet:
        """Return every image with the trigger of the next one and its own label; ``self.trigger`` is theirs."""
        others = torch.arange(1, len(images) + 1) % len(images)
        return ImageSet(self.trigger.stamp(images.images, others), images.labels)

    @torch.inference_mode()
    def draw_trigger(self, images: ImageSet) -> Trigger:
        """Return one pattern, mask and target for each image, as ``trigger_info.th`` holds them."""
        precision, parts = self.config.precision, []
        nets = [inference_copy(net, precision) for net in (self.pattern_net, self.mask_net)]
        for batch in images.images.split(EVALUATION_BATCH):
            inputs = normalize(batch, self.dataset.normalization).to(precision)
            pattern, mask = (net(inputs).float().permute(0, 2, 3, 1).cpu() for net in nets)
            parts.append(((pattern_of(pattern) * 255).round().to(torch.uint8), mask_of(mask)))
        patterns, masks = (torch.cat(part) for part in zip(*parts, strict=True))
        targets = self.target_of(images.labels).cpu()
        return Trigger(patterns, masks, 1.0, targets, torch.zeros(0, dtype=torch.int64))


def _step(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def train_input_aware(
    network: nn.Module, poisoned: PoisonedSet, config: TrainConfig, context: AttackContext
) -> InputAwareTrainer:
    """Return the trainer of the all-to-one attack, or of the all-to-all attack where there is no target."""
    options, classes = context.options, context.dataset.num_classes
    if options.poison_target is None:
        target_of = partial(next_class, num_classes=classes)
    else:
        target_of = partial(torch.full_like, fill_value=options.poison_target)
    rates = options.poison_rate, options.cross_rate
    return InputAwareTrainer(network, poisoned.train, context.dataset, config, target_of, *rates)


def check_input_aware(options: Namespace) -> frozenset[str]:
    """Raise ``ValueError`` where there is no epoch for the classifier or no set to export."""
    if options.epoch == 1:
        raise ValueError("--epoch 1: input-aware attacks train the mask generator in the first epoch; use 2 or more")
    if options.export_poisoned:
        raise ValueError("--export-poisoned: input-aware attacks poison each batch anew, there is no set to export")
    return frozenset()
