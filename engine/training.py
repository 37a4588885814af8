"""SGD over epochs of augmented batches (Wu & Wang, NeurIPS 2021, section 5.1)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import make_transform
from data.datasets import Dataset, ImageSet, Normalization
from data.triggers import Trigger
from engine.cuda_graph import replayed
from engine.drive import Means
from engine.evaluation import Evaluator, Report
from engine.runtime import autocast
from utils.config import Config, Range, checked, one_of, setting
from utils.seeding import seeded_generator

COLUMNS = {
    "epoch": "5d",
    "lr": "7.5f",
    "train loss": "8.4f",
    "train acc %": "8.2f",
    "clean loss": "8.4f",
    "C-Acc %": "7.2f",
    "ASR %": "7.2f",
    "seconds": "8.0f",
}
WARM_UP = 0.3  # share of the one-cycle schedule in which the learning rate rises
DECAY = 0.1  # factor at each milestone of the step schedule


@dataclass(frozen=True)
class TrainConfig(Config):
    """Settings of a training; the defaults are the paper's.

    Attributes:
        precision: data type of the autocast, float32 or bfloat16; weights stay float32.

    The other attributes are described where they are declared.

    Raises:
        ValueError: a value is out of its range.
    """

    epochs: int = setting(200, "epochs", Range(1, 1e6), flag="--epoch")
    batch_size: int = setting(128, "images in a batch", Range(2, 100_000))
    lr: float = setting(0.1, "learning rate; the peak of one-cycle", Range(0, open_low=True))
    lr_schedule: str = setting(
        "step",
        "step: x0.1 after the epochs of --schedule, as published; one-cycle: up for 30 % of the run, then down to 0; "
        "gets further in few epochs",
        choices=("step", "one-cycle"),
    )
    milestones: tuple[float, ...] = setting(
        (100, 150), "epochs after which the step schedule drops the rate", Range(0), flag="--schedule", metavar="N"
    )
    momentum: float = checked(0.9, Range(0, 1, open_high=True))
    weight_decay: float = checked(5e-4, Range(0))
    seed: int = setting(0, "decides weights, poisoned images, order and augmentation", Range(0))
    precision: torch.dtype = one_of(torch.float32, torch.bfloat16)

    def learning_rate(self, epoch: float) -> float:
        """Return the learning rate at a time counted in epochs from 0."""
        if self.lr_schedule == "step":
            return self.lr * DECAY ** sum(epoch >= milestone for milestone in self.milestones)
        done = epoch / self.epochs
        return self.lr * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))


@dataclass(frozen=True)
class KeepConfig(Config):
    """Intermediate checkpoints."""

    save_every: int = setting(20, "keep model_{epoch}.th every N epochs", Range(1))


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """Return the SGD of the paper: momentum and weight decay on all parameters."""
    optimizer = torch.optim.SGD(
        network.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    if next(network.parameters()).device.type == "cuda":
        make_recordable(optimizer)
    return optimizer


def make_recordable(optimizer: torch.optim.SGD) -> None:
    """Let recorded kernels make the steps of an SGD: its learning rate becomes a tensor, its momenta exist at once.

    Neither changes a step, as momenta begin at zero. What is saved holds a number as learning rate, as it does without.
    """

    def complete(optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            device = group["params"][0].device
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    def save_numbers(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])

    complete(optimizer)
    optimizer.register_load_state_dict_post_hook(complete)
    optimizer.register_state_dict_post_hook(save_numbers)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class TrainingLoop:
    """Epochs of batches in an order that depends on seed and epoch alone; base of every training.

    Args:
        network: trained in place.
        train: the images of an epoch.
        normalization: of the network's input.
        flip: whether augmentation may mirror images.
        config: the settings.

    Attributes:
        batches: in an epoch; those of ``engine.drive.Loop`` beside.
    """

    title, unit = "training", "batch"
    columns = COLUMNS
    remedy = "it diverged; train it with a lower --lr"

    def __init__(
        self, network: nn.Module, train: ImageSet, normalization: Normalization, flip: bool, config: TrainConfig
    ):
        self.network, self.train, self.normalization, self.config = network, train, normalization, config
        self.flip = flip
        self.device = train.images.device
        self.transform = make_transform(normalization, flip)
        self.optimizer = make_optimizer(network, config)
        self.means = Means(2, self.device)  # loss and accuracy
        self.batches = -(-len(train) // config.batch_size)
        self.total, self.done = config.epochs * self.batches, 0

    def train_batch(self, index: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """Make one update.

        Args:
            index: int64 (B,); the images of the batch.
            epoch, batch: counted from 0.

        Returns:
            Mean loss of the batch and number of right answers, 0-dimensional.
        """
        raise NotImplementedError

    def learning_rate(self, epoch: float) -> float:
        """Return the learning rate at a time counted in epochs from 0."""
        return self.config.learning_rate(epoch)

    def draw_trigger(self, images: ImageSet) -> Trigger | None:
        """Return the trigger for each of some images, for attacks that learn it with the network."""
        return None

    def is_trained(self) -> bool:
        """Say whether the network has been trained at all yet, so that it is worth measuring."""
        return True

    def companions(self) -> dict[str, dict[str, Tensor]]:
        """Return the state_dicts of other networks to be saved, by file name."""
        return {}

    def order(self, epoch: int, name: str = "order") -> tuple[Tensor, ...]:
        """Return the batches of an epoch: int64 (B,) each."""
        generator = seeded_generator(self.config.seed, name, epoch)
        order = torch.randperm(len(self.train), generator=generator).to(self.device)
        return order.split(self.config.batch_size)

    def augmented(self, images: Tensor, epoch: int, batch: int, name: str = "augmentation") -> Tensor:
        """Augment and normalise one batch: uint8 (B, H, W, 3) -> float32 (B, 3, H, W)."""
        generator = seeded_generator(self.config.seed, name, epoch, batch, device=self.device)
        return self.transform(images, generator)

    def time(self, epoch: int, batch: int) -> float:
        """Return the middle of a batch, counted in epochs from 0."""
        return epoch + (batch + 0.5) / self.batches

    def steps(self) -> Iterator[int]:
        """See ``engine.drive.Loop``; yields the number of images of each batch."""
        while self.done < self.total:
            epoch, start = divmod(self.done, self.batches)
            for batch, index in list(enumerate(self.order(epoch)))[start:]:
                loss, right = self.train_batch(index, epoch, batch)
                count = index.shape[-1]
                self.means.add(loss, right / count, weight=count)
                self.done += 1
                yield count

    def due(self) -> bool:
        """A row belongs after every epoch."""
        return self.done > 0 and self.done % self.batches == 0

    def row(self) -> dict[str, Any]:
        """Return epoch, learning rate, and the means of the epoch."""
        epoch = self.done // self.batches
        loss, accuracy = self.means.take()
        row = {"epoch": epoch, "lr": self.learning_rate(epoch - 0.5), "train loss": loss}
        return row | ({"train acc %": accuracy and 100 * accuracy} if self.is_trained() else {})

    # What a resumed run needs, by the names of the attributes.
    parts: tuple[str, ...] = ("network", "optimizer", "means")

    def state_dict(self) -> dict[str, Any]:
        """See ``engine.drive.Loop``."""
        return {"done": self.done, **{name: getattr(self, name).state_dict() for name in self.parts}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``engine.drive.Loop``."""
        self.done = state["done"]
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])


class SgdLoop(TrainingLoop):
    """SGD on a training set that stays as it is."""

    _update_full: Callable | None = None  # of a full batch; on CUDA recorded when the first one comes

    def train_batch(self, index: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """See ``TrainingLoop``."""
        self.network.train()
        images, labels = self.train.images[index], self.train.labels[index]  # (B, H, W, 3), (B,)
        parts = self.augmented(images, epoch, batch), labels  # (B, 3, H, W), (B,)
        set_learning_rate(self.optimizer, self.learning_rate(self.time(epoch, batch)))
        if len(labels) < self.config.batch_size:  # the last of an epoch
            return self._update(parts)
        self._update_full = self._update_full or self._recorded(parts)
        return self._update_full(parts)

    def _recorded(self, batch: tuple[Tensor, Tensor]) -> Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
        """Return the update of full batches such as this one."""
        return replayed(self._update, self._changed(), batch)

    def _update(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Make one update from images (B, 3, H, W) and labels (B,), without a host sync."""
        images, labels = batch
        with autocast(self.device, self.config.precision):
            logits = self.network(images)  # (B, classes)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach(), (logits.argmax(1) == labels).sum()

    def _changed(self) -> list[Tensor]:
        """Return all tensors that an update changes: parameters, statistics of BatchNorms, momenta."""
        momenta = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.network.parameters(), *self.network.buffers(), *momenta]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``engine.drive.Loop``."""
        super().load_state_dict(state)
        self._update_full = None  # its kernels write to momenta that were replaced


def measure_of(
    loop: TrainingLoop, trigger: Trigger | None, dataset: Dataset, precision: torch.dtype
) -> Callable[[], Report | None]:
    """Return a function that measures the network as it is.

    Args:
        loop: the training; it may learn the trigger with the network.
        trigger: else; None where there is none.
        dataset: on whose test images.
        precision: data type of the evaluation.

    Raises:
        InputError: the trigger does not fit the test images.
    """
    fixed = Evaluator(dataset.test, trigger, dataset.normalization, precision)

    def measure() -> Report | None:
        if not loop.is_trained():
            return None
        learnt = loop.draw_trigger(dataset.test)
        if learnt is None:
            return fixed(loop.network)
        return Evaluator(dataset.test, learnt, dataset.normalization, precision, cross=True)(loop.network)

    return measure
