"""FT-SAM: Zhu, Wei, Shen, Fan & Wu, *Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization*,
ICCV 2023.

Fine-tuning whose gradient is taken where a perturbation of the weights makes the loss worst. The perturbation is scaled
by the weights, so that it moves most the large ones, on which a backdoor rests:

    e = rho * T^2 g / ||T g||_2,  T = diag(|w|),  g the gradient at w
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from defenses.tuning import TuningConfig, TuningLoop
from utils.config import Range, setting


class SharpnessAwareLoop(TuningLoop):
    """Two passes an update: one to find the perturbation, one at the perturbed weights."""

    def loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """See ``TuningLoop``."""
        logits = self.forward(images)
        return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing), logits

    def update(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """See ``TuningLoop``; statistics of BatchNorms follow the first pass alone."""
        images, labels = batch
        parameters = self.parameters
        loss, logits = self.loss(images, labels)
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        weights = [parameter.detach().clone() for parameter in parameters]
        statistics = [buffer.clone() for buffer in self.network.buffers()]
        with torch.no_grad():
            scaled = [weight.abs() * gradient for weight, gradient in zip(weights, gradients, strict=True)]  # T g
            norm = torch.stack([part.square().sum() for part in scaled]).sum().sqrt().clamp_min(1e-12)
            for parameter, weight, part in zip(parameters, weights, scaled, strict=True):
                parameter.add_(self.config.rho * weight.abs() * part / norm)  # T^2 g = T (T g)
        perturbed, _ = self.loss(images, labels)
        gradients = torch.autograd.grad(perturbed, parameters, materialize_grads=True)
        with torch.no_grad():
            for kept, now in ((weights, parameters), (statistics, self.network.buffers())):
                for value, tensor in zip(kept, now, strict=True):
                    tensor.copy_(value)
        self.descend(gradients)
        return loss.detach(), (logits.argmax(1) == labels).float().mean()


@dataclass(frozen=True)
class SharpnessAware(TuningConfig):
    """FT-SAM; 400 updates are 100 epochs of 500 images. The learning rate falls to 0 like half a cosine."""

    title: ClassVar[str] = "FT-SAM"
    loop: ClassVar[type[TuningLoop]] = SharpnessAwareLoop
    iterations: int = setting(400, "updates", Range(1, 1e9), flag="--nb-iter")
    lr: float = setting(
        0.01, "learning rate at the beginning; it falls to 0 like half a cosine", Range(0, open_low=True)
    )
    rho: float = setting(2.0, "size of the perturbation; 8 for harder datasets", Range(0), "--sam-rho")
    label_smoothing: float = setting(0.1, "of the cross entropy", Range(0, 1, open_high=True))

    def learning_rate(self, iteration: int) -> float:
        """See ``TuningConfig``."""
        return self.lr * (1 + math.cos(math.pi * iteration / self.iterations)) / 2
