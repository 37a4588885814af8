"""MCR, mode connectivity repair: Zhao, Chen, Das, Natesan Ramamurthy & Lin, *Bridging Mode Connectivity in Loss
Landscapes and Adversarial Robustness*, ICLR 2020.

Two networks are the ends of a curve of networks, a quadratic Bezier curve in the space of their weights:

    w(t) = (1 - t)^2 w_0 + 2 t (1 - t) w_1 + t^2 w_2,  t in [0, 1]

w_0 is the network to repair and w_2 a second one: here its fine-tuned copy, as there is one network at hand. Only the
middle w_1 is trained, so that every network of the curve is right on the clean images. The ones between the ends are
said to have lost the backdoor; Wu & Wang (NeurIPS 2021) report t = 0.3.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.defense import CleanImages
from defenses.tuning import TuningConfig, TuningLoop
from engine.runtime import autocast
from engine.training import make_optimizer
from models.statistics import measure_statistics
from utils.config import Range, setting

PLACES = tuple(round(0.1 * number, 1) for number in range(11))  # of the curve, at which its networks are shown
LAST_RATE = 0.01  # of the learning rate is left at the end


def bezier(t: float | Tensor) -> tuple[Any, Any, Any]:
    """Return the weights of w_0, w_1 and w_2 in w(t)."""
    return (1 - t) ** 2, 2 * t * (1 - t), t**2


class ModeConnectivityLoop(TuningLoop):
    """First the fine-tuning that makes w_2, then the training of the middle w_1; ``network`` is what is trained."""

    def __init__(self, network: nn.Module, clean: CleanImages, config: "ModeConnectivity"):
        self.end_loop = TuningLoop(network, clean, config.fine_tuning(config.end_iterations))
        super().__init__(network, clean, config, before=config.end_iterations)
        self.optimizer = make_optimizer(self.network, replace(config, weight_decay=0.0))  # that of w(t) comes in update
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        self.point = copy.deepcopy(self.network)  # the network w(t) of an update

    @property
    def end(self) -> nn.Module:
        """The network at t = 1."""
        return self.end_loop.network

    def steps(self) -> Iterator[int]:
        """See ``engine.drive.Loop``."""
        for _ in self.end_loop.steps():
            self.done += 1
            if self.end_loop.done == self.end_loop.total:
                self._start_middle()
            yield self.done
        yield from self.tuning_steps()

    @torch.no_grad()
    def _start_middle(self) -> None:
        for middle, start, end in zip(self.parameters, self.start, self.end.parameters(), strict=True):
            middle.copy_((start + end) / 2)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw a batch and a place of the curve, t in 0..1, 0-dimensional."""
        return *super().draw(generator), torch.rand((), generator=generator, device=self.device)

    @torch.no_grad()
    def _place(self, network: nn.Module, t: float | Tensor) -> None:
        """Give a network the weights w(t)."""
        a, b, c = bezier(t)
        ends = self.start, self.parameters, self.end.parameters()
        for parameter, start, middle, end in zip(network.parameters(), *ends, strict=True):
            parameter.copy_(a * start + b * middle + c * end)

    def update(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """See ``TuningLoop``; cross entropy and weight decay are those of w(t)."""
        images, labels, t = batch
        self._place(self.point, t)
        self.point.train()
        with autocast(self.device, self.config.precision):
            logits = self.point(images).float()
        loss = F.cross_entropy(logits, labels)
        weights = list(self.point.parameters())
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
        _, share, _ = bezier(t)  # dw(t)/dw_1
        decay = self.config.weight_decay
        self.descend(share * (g + decay * weight.detach()) for g, weight in zip(gradients, weights, strict=True))
        return loss.detach(), (logits.argmax(1) == labels).float().mean()

    def changed(self) -> list[Tensor]:
        """See ``TuningLoop``."""
        return [*super().changed(), *self.point.parameters(), *self.point.buffers()]

    def network_at(self, t: float) -> nn.Module:
        """Return the network w(t) with statistics of its own, over the clean images as they are."""
        network = copy.deepcopy(self.point)
        self._place(network, t)

        def run() -> None:
            for inputs, _ in self.clean.batches():
                with autocast(self.device, self.config.precision):
                    network(inputs)

        measure_statistics(network, run)
        return network

    def current(self) -> nn.Module:
        """Return the network at the operating point; before the curve is there, the one being fine-tuned."""
        return self.network_at(self.config.t) if self.tuned else self.end

    def candidates(self) -> dict[float, Callable[[], nn.Module]]:
        """See ``RepairLoop``."""
        return {t: partial(self.network_at, t) for t in PLACES}

    def found(self) -> dict[str, Any]:
        """See ``RepairLoop``."""
        return {"chosen": f"t = {self.config.t:g}"}

    def state_dict(self) -> dict[str, Any]:
        """See ``engine.drive.Loop``."""
        return {**super().state_dict(), "end": self.end_loop.state_dict(), "point": self.point.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``engine.drive.Loop``."""
        super().load_state_dict(state)
        self.end_loop.load_state_dict(state["end"])
        self.point.load_state_dict(state["point"])


@dataclass(frozen=True)
class ModeConnectivity(TuningConfig):
    """Mode connectivity repair, with a fine-tuned copy as the second end.

    The learning rate is constant in the first half, falls to a hundredth until 90 % of the run, and stays there.
    """

    title: ClassVar[str] = "MCR"
    loop: ClassVar[type[TuningLoop]] = ModeConnectivityLoop
    t: float = setting(0.3, "place of the result on the curve; 0 is the network that came in", Range(0, 1), "--mcr-t")
    end_iterations: int = setting(
        2000, "updates of the fine-tuning that makes the curve's other end", Range(1, 1e9), "--mcr-end-iter"
    )

    def learning_rate(self, iteration: int) -> float:
        """See ``TuningConfig``."""
        done = iteration / self.iterations
        return self.lr * max(LAST_RATE, min(1.0, 1 - (1 - LAST_RATE) * (done - 0.5) / 0.4))
