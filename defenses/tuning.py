"""SGD on batches of the defender's clean images, the base of every defence that trains."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.defense import CleanImages, Defense, RepairLoop
from engine.cuda_graph import replayed
from engine.drive import UNTRAINED_REMEDY, Means
from engine.runtime import autocast
from engine.training import make_optimizer, set_learning_rate
from models.neuron_layers import along_first
from utils.config import Range, setting
from utils.seeding import seeded_generator

COLUMNS = {
    "iteration": "9d",
    "lr": "7.5f",
    "loss": "8.4f",
    "batch acc %": "8.2f",
    "C-Acc %": "7.2f",
    "ASR %": "7.2f",
    "seconds": "8.0f",
}
DROP_AT, DROP = 0.8, 0.1  # after this share of the updates the learning rate is multiplied by DROP


@dataclass(frozen=True)
class TuningConfig(Defense):
    """Settings of a training on the clean images.

    Raises:
        ValueError: a setting is out of range.
    """

    milder: ClassVar[str] = "lower --lr"
    lr: float = setting(0.01, "learning rate; a tenth of it in the last fifth of the run", Range(0, open_low=True))
    iterations: int = setting(2000, "updates", Range(1, 1e9), flag="--nb-iter")
    batch_size: int = setting(128, "images in a batch, drawn with replacement", Range(2, 100_000))
    seed: int = setting(0, "decides batches, augmentation and all else that is drawn", Range(0))
    momentum: float = setting(0.9, "of the SGD", Range(0, 1, open_high=True))
    weight_decay: float = setting(5e-4, "of the SGD", Range(0))

    def fine_tuning(self, iterations: int) -> "TuningConfig":
        """Return the settings of a plain fine-tuning that is a part of this defence."""
        shared = {each.name: getattr(self, each.name) for each in fields(TuningConfig)}
        return TuningConfig(**{**shared, "iterations": iterations})

    def learning_rate(self, iteration: int) -> float:
        """Return the learning rate of an update, counted from 0."""
        return self.lr * (DROP if iteration >= DROP_AT * self.iterations else 1)


def pruned_rows(network: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the weights and biases in which something is pruned, with 0 for the neurons that are and 1 for the others.

    A neuron is pruned where all of its weight is exactly 0, whoever pruned it. Its bias is pruned where it is exactly 0
    as well, as FP and CLP leave it; ANP leaves the bias, which is trained on. The factors have the shape (C, 1, ...) of
    the parameter (C, ...).
    """
    parameters, found = dict(network.named_parameters()), []
    for name, weight in parameters.items():
        if name.rpartition(".")[2] == "weight" and not (kept := _not_zero(weight)).all():
            found.append((weight, kept))
            bias = parameters.get(name.removesuffix("weight") + "bias")
            if bias is not None and bias.shape[:1] == weight.shape[:1]:
                found.append((bias, kept | _not_zero(bias)))
    return [(part, along_first(kept.to(part.dtype), part)) for part, kept in found if not kept.all()]


def _not_zero(parameter: Tensor) -> Tensor:
    """Say which neurons have a part that is not 0: bool (C,)."""
    return parameter.detach().flatten(1).any(1) if parameter.dim() > 1 else parameter.detach() != 0


class TuningLoop(RepairLoop):
    """Updates of all weights from batches that depend on seed and iteration alone. Pruned neurons stay pruned.

    Args:
        before: how many steps of another kind come first; they have no rows, but for the first of all.
    """

    title, unit = "tuning", "update"
    columns = COLUMNS
    row_every = 500

    def __init__(self, network: nn.Module, clean: CleanImages, config: TuningConfig, before: int = 0):
        super().__init__(network, clean, config)
        self.device, self.parameters = clean.images.device, list(self.network.parameters())
        self.optimizer = make_optimizer(self.network, config)
        self.means = Means(2, self.device)  # loss and accuracy
        self.before, self.total = before, before + config.iterations
        self._pruned: list[tuple[nn.Parameter, Tensor]] | None = None
        self._run: Callable | None = None  # an update; on CUDA its recorded kernels

    @property
    def tuned(self) -> int:
        """Updates made so far."""
        return max(self.done - self.before, 0)

    @property
    def remedy(self) -> str:
        """What to do where the loss is not finite."""
        return "it diverged; lower --lr" if self.done else UNTRAINED_REMEDY

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw what one update needs; images (B, ...) and labels (B,) come first."""
        return self.clean.draw(self.config.batch_size, generator)

    def loss(self, images: Tensor, labels: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss that is minimised, 0-dimensional, and the logits (B, classes) on the images as they are."""
        logits = self.forward(images)
        return F.cross_entropy(logits, labels), logits

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, float32 (B, classes)."""
        with autocast(self.device, self.config.precision):
            return self.network(images).float()

    def update(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Make one update, without a host sync; return loss and accuracy of the batch, 0-dimensional."""
        loss, logits = self.loss(*batch)
        self.descend(torch.autograd.grad(loss, self.parameters, materialize_grads=True))
        return loss.detach(), (logits.argmax(1) == batch[1]).float().mean()

    def descend(self, gradients: Iterable[Tensor]) -> None:
        """Make a step of the SGD from a gradient for each parameter; pruned neurons have no part in it."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        for parameter, kept in self._pruned:
            parameter.grad.mul_(kept)
        self.optimizer.step()

    def changed(self) -> list[Tensor]:
        """Return all tensors that an update changes: parameters, statistics of BatchNorms, momenta."""
        momenta = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.parameters, *self.network.buffers(), *momenta]

    def steps(self) -> Iterator[int]:
        """See ``engine.drive.Loop``."""
        yield from self.tuning_steps()

    def tuning_steps(self) -> Iterator[int]:
        """Make the updates that are left."""
        self._pruned = pruned_rows(self.network)
        while self.done < self.total:
            iteration = self.tuned
            batch = self.draw(seeded_generator(self.config.seed, "tuning", iteration, device=self.device))
            set_learning_rate(self.optimizer, self.config.learning_rate(iteration))
            if self._run is None:
                self._check_labels(batch[0])
            self.network.train()
            self._run = self._run or replayed(self.update, self.changed(), batch)
            self.means.add(*self._run(batch))
            self.done += 1
            yield self.done

    @torch.no_grad()
    def _check_labels(self, images: Tensor) -> None:
        """Make sure, before it trains, that the network has an output for every label."""
        self.network.eval()
        self.clean.check_labels(self.forward(images[:2]).shape[1])

    def due(self) -> bool:
        """A row belongs at the beginning, after every ``row_every`` updates, and at the end."""
        regular = self.done > self.before and self.tuned % self.row_every == 0
        return regular or self.done in (0, self.total)

    def row(self) -> dict[str, Any]:
        """Return the means since the last row."""
        loss, accuracy = self.means.take()
        rate = self.config.learning_rate(max(self.tuned - 1, 0))
        return {"iteration": self.tuned, "lr": rate, "loss": loss, "batch acc %": accuracy and 100 * accuracy}

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
        self._run = None  # its kernels write to momenta that were replaced
