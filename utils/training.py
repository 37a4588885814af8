"""Step 1's loop: SGD over one epoch of augmented batches (Wu & Wang, NeurIPS 2021, section 5.1)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import normalize, random_crop_flip
from data.datasets import ImageSet, Normalization
from data.seeding import seeded_generator
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
    milestones: tuple[int, ...] = (100, 150)
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


def make_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """Return the SGD of the paper: momentum and weight decay on all parameters."""
    return torch.optim.SGD(
        network.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: ImageSet,
    normalization: Normalization,
    config: TrainConfig,
    state: TrainState,
) -> Iterator[int]:
    """Train from ``state`` to the end of its epoch; the state moves on with every batch.

    The order of the images depends on seed and epoch alone, the augmentation on seed, epoch and batch.

    Yields:
        The number of images of each batch, after its update.
    """
    device = train.images.device
    order = torch.randperm(len(train), generator=seeded_generator(config.seed, "order", state.epoch)).to(device)
    batches = order.split(config.batch_size)
    network.train()
    while state.batch < len(batches):
        batch = train[batches[state.batch]]
        generator = seeded_generator(config.seed, "augmentation", state.epoch, state.batch, device=device)
        images = normalize(random_crop_flip(batch.images, generator), normalization)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(state.epoch + (state.batch + 0.5) / len(batches))
        with torch.autocast(device.type, config.precision, config.precision != torch.float32):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state.loss_sum += loss.detach() * len(batch)
        state.correct += (logits.argmax(1) == batch.labels).sum()
        state.batch += 1
        yield len(batch)


def fit(
    run: Run,
    network: nn.Module,
    train: ImageSet,
    normalization: Normalization,
    config: TrainConfig,
    evaluator: Evaluator,
) -> Iterator[tuple[dict, Report]]:
    """Train to the end, or on from the run's saved state, with one row of the log an epoch.

    Yields:
        The row of each epoch and what the network measured after it.
    """
    optimizer = make_optimizer(network, config)
    state = TrainState.start(train.images.device)
    if run.saved:
        network.load_state_dict(run.saved["network"])
        optimizer.load_state_dict(run.saved["optimizer"])
        epoch, batch, *sums = run.saved["state"]
        state = TrainState(epoch, batch, *(value.to(train.images.device) for value in sums))
    log = run.table(COLUMNS)
    run.snapshot = lambda: {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "state": [state.epoch, state.batch, state.loss_sum, state.correct],
    }
    batches = -(-len(train) // config.batch_size)
    while True:
        steps = train_epoch(network, optimizer, train, normalization, config, state)
        for _ in run.track(steps, batches, state.batch, f"epoch {state.epoch + 1}/{config.epochs}", "batch"):
            pass
        report = evaluator(network)
        row = {
            "epoch": state.epoch + 1,
            "lr": config.learning_rate(state.epoch + 0.5),
            "train loss": state.loss_sum.item() / len(train),
            "train acc %": percent(state.correct.item() / len(train)),
            "clean loss": report.clean.loss,
            "C-Acc %": percent(report.clean.accuracy),
            "ASR %": report.triggered and percent(report.triggered.accuracy),
            "seconds": run.seconds,
        }
        if len(log.rows) == state.epoch:  # else the run was interrupted after this row was written
            log.add(row)
        yield row, report
        if state.epoch + 1 == config.epochs:
            return
        state = TrainState.start(train.images.device, state.epoch + 1)
