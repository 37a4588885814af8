"""Step 1's loop: SGD over one epoch of augmented batches (Wu & Wang, NeurIPS 2021, section 5.1)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import normalize, random_crop_flip
from data.datasets import Dataset, ImageSet
from data.seeding import seeded_generator
from data.triggers import Trigger
from utils.evaluation import Evaluator, Report, percent
from utils.run import Run

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
class TrainConfig:
    """Settings of step 1; the defaults are the paper's.

    Attributes:
        epochs, batch_size: at least 1.
        lr: learning rate, or the peak of the one-cycle schedule; above 0.
        lr_schedule: ``step`` (x0.1 after each milestone) or ``one-cycle`` (linear up for 30 %, linear down to 0).
        milestones: epochs after which ``step`` drops the rate.
        seed: decides order and augmentation.
        precision: data type of the autocast, float32 or bfloat16; weights stay float32.
    """

    epochs: int = 200
    batch_size: int = 128
    lr: float = 0.1
    lr_schedule: str = "step"
    milestones: tuple[float, ...] = (100, 150)
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0
    precision: torch.dtype = torch.float32

    def learning_rate(self, epoch: float) -> float:
        """Return the learning rate at a time counted in epochs from 0."""
        if self.lr_schedule == "step":
            return self.lr * DECAY ** sum(epoch >= milestone for milestone in self.milestones)
        done = epoch / self.epochs
        return self.lr * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))


@dataclass
class TrainState:
    """Where a training stands: finished epochs, finished batches of the next one, and that epoch's sums so far."""

    epoch: int
    batch: int
    loss_sum: Tensor
    correct: Tensor

    @classmethod
    def start(cls, device: torch.device, epoch: int = 0) -> "TrainState":
        """Return the state at the beginning of an epoch."""
        zeros = torch.zeros(2, device=device, dtype=torch.float64)
        return cls(epoch, 0, *zeros.unbind())

    def count(self, loss: Tensor, images: int, correct: Tensor | int) -> None:
        """Move on by one batch."""
        self.loss_sum += loss.detach() * images
        self.correct += correct
        self.batch += 1


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """Return the SGD of the paper: momentum and weight decay on all parameters."""
    return torch.optim.SGD(
        network.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )


def epoch_order(config: TrainConfig, epoch: int, size: int, device: torch.device, name: str = "order") -> Tensor:
    """Return the order of an epoch's images, which depends on seed, epoch and name alone: int64 (size,)."""
    return torch.randperm(size, generator=seeded_generator(config.seed, name, epoch)).to(device)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class Trainer(Protocol):
    """What ``fit`` drives, epoch by epoch.

    Attributes:
        train: the images of an epoch.
        config: the settings.
        trigger: of the network as it is; None where there is none, or none yet.
        columns: of the log, with their formats.
    """

    train: ImageSet
    config: TrainConfig
    trigger: Trigger | None
    columns: dict[str, str]

    def train_epoch(self, state: TrainState) -> Iterator[int]:
        """Train from ``state`` to the end of its epoch; the state moves on with every batch, whose size is yielded."""

    def learning_rate(self, epoch: float) -> float:
        """Return the learning rate at a time counted in epochs from 0."""

    def evaluate(self, epoch: int) -> Report | None:
        """Measure the network after an epoch, counted from 1; None where it is not trained yet."""

    def companions(self) -> dict[str, dict[str, Tensor]]:
        """Return the state_dicts of other networks to be saved, by file name."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that training changes, in tensors and plain containers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to what ``state_dict`` returned."""


class SgdTrainer:
    """SGD on a training set that stays as it is.

    Args:
        network: trained in place.
        train: the images, poisoned or not.
        trigger: for the attack success rate; None where there is none.
        dataset: its test set and normalisation.
        config: settings.

    Raises:
        InputError: the trigger does not fit the test images.
    """

    columns = COLUMNS

    def __init__(
        self, network: nn.Module, train: ImageSet, trigger: Trigger | None, dataset: Dataset, config: TrainConfig
    ):
        self.network, self.train, self.trigger, self.config = network, train, trigger, config
        self.normalization = dataset.normalization
        self.optimizer = make_optimizer(network, config)
        self.evaluator = Evaluator(dataset.test, trigger, None, dataset.normalization, config.precision)
        self.learning_rate = config.learning_rate

    def train_epoch(self, state: TrainState) -> Iterator[int]:
        """See ``Trainer``. The order depends on seed and epoch alone, the augmentation on seed, epoch and batch."""
        config, device = self.config, self.train.images.device
        batches = epoch_order(config, state.epoch, len(self.train), device).split(config.batch_size)
        self.network.train()
        while state.batch < len(batches):
            batch = self.train[batches[state.batch]]
            generator = seeded_generator(config.seed, "augmentation", state.epoch, state.batch, device=device)
            images = normalize(random_crop_flip(batch.images, generator), self.normalization)
            set_learning_rate(self.optimizer, self.learning_rate(state.epoch + (state.batch + 0.5) / len(batches)))
            with torch.autocast(device.type, config.precision, config.precision != torch.float32):
                logits = self.network(images)
            loss = F.cross_entropy(logits.float(), batch.labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            state.count(loss, len(batch), (logits.argmax(1) == batch.labels).sum())
            yield len(batch)

    def evaluate(self, epoch: int) -> Report:
        return self.evaluator(self.network)

    def companions(self) -> dict[str, dict[str, Tensor]]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


def fit(run: Run, trainer: Trainer) -> Iterator[tuple[dict, Report | None]]:
    """Train to the end, or on from the run's saved state, with one row of the log an epoch.

    Yields:
        The row of each epoch and what the network measured after it.

    Raises:
        InputError: the training diverged.
        OSError: log or state cannot be written.
    """
    device, images, epochs = trainer.train.images.device, len(trainer.train), trainer.config.epochs
    batches = -(-images // trainer.config.batch_size)
    state = TrainState.start(device)
    if run.saved:
        trainer.load_state_dict(run.saved["trainer"])
        epoch, batch, *sums = run.saved["state"]
        state = TrainState(epoch, batch, *(value.to(device) for value in sums))
    log = run.table(trainer.columns)
    run.snapshot = lambda: {
        "trainer": trainer.state_dict(),
        "state": [state.epoch, state.batch, state.loss_sum, state.correct],
    }
    while True:
        steps = trainer.train_epoch(state)
        for _ in run.track(steps, batches, state.batch, f"epoch {state.epoch + 1}/{epochs}", "batch"):
            pass
        report = trainer.evaluate(state.epoch + 1)
        row = {
            "epoch": state.epoch + 1,
            "lr": trainer.learning_rate(state.epoch + 0.5),
            "train loss": state.loss_sum.item() / images,
            "train acc %": report and percent(state.correct.item() / images),
            "clean loss": report and report.clean.loss,
            "C-Acc %": report and percent(report.clean.accuracy),
            "ASR %": report and report.triggered and percent(report.triggered.accuracy),
            "cross %": report and report.cross and percent(report.cross.accuracy),
            "seconds": run.seconds,
        }
        row = {name: row[name] for name in trainer.columns}
        if len(log.rows) == state.epoch:  # else the run was interrupted after this row was written
            log.add(row)
        yield row, report
        if state.epoch + 1 == epochs:
            return
        state = TrainState.start(device, state.epoch + 1)
