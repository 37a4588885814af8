"""BAN's fine-tuning: Xu, Liu, Koffas, Yu & Picek, *BAN: Detecting Backdoors Activated by Adversarial Neuron Noise*,
NeurIPS 2024.

All weights learn to be right on clean images while the neurons are adversarially perturbed, as ANP perturbs them
(Wu & Wang, NeurIPS 2021, equation 4): CE(w, b) + lambda * CE((1 + d) * w, (1 + x) * b).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from defenses.defense import CleanImages
from defenses.tuning import TuningConfig, TuningLoop
from engine.runtime import autocast
from models.neuron_layers import NO_NEURON, along_first, neuron_layers
from utils.config import Range, setting
from utils.errors import InputError


class NoisyTuningLoop(TuningLoop):
    """Each update draws a noise, makes it worse by one step, and descends on both losses."""

    def __init__(self, network: nn.Module, clean: CleanImages, config: "NoisyTuning"):
        super().__init__(network, clean, config)
        self.layers = neuron_layers(self.network)
        if not self.layers:
            raise InputError(NO_NEURON)
        self.neurons = sum(len(layer.weight) for layer in self.layers.values())

    def draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw a batch and the start of the noise, uniform in -eps..eps: d and x, (n,) each over all neurons."""
        batch = super().draw(generator)
        noise = torch.rand(2, self.neurons, generator=generator, device=self.device)  # 0..1
        return *batch, *(self.config.eps * (2 * noise - 1))

    def noisy_forward(self, images: Tensor, d: Tensor, x: Tensor) -> Tensor:
        """Return the logits of the network with perturbed neurons, float32 (B, classes).

        Batches are normalised by their own statistics; the running ones are left alone.
        """
        tensors = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        sizes = [len(layer.weight) for layer in self.layers.values()]
        for (name, layer), scale, shift in zip(self.layers.items(), d.split(sizes), x.split(sizes), strict=True):
            tensors[f"{name}.weight"] = layer.weight * along_first(1 + scale, layer.weight)
            if layer.bias is not None:
                tensors[f"{name}.bias"] = layer.bias * (1 + shift)
        with autocast(self.device, self.config.precision):
            return functional_call(self.network, tensors, (images,)).float()

    def loss(self, images: Tensor, labels: Tensor, d: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """See ``TuningLoop``."""
        d, x = d.detach().requires_grad_(), x.detach().requires_grad_()
        worst = F.cross_entropy(self.noisy_forward(images, d, x), labels)
        gradients = torch.autograd.grad(worst, (d, x), materialize_grads=True)
        d, x = (part.detach() + self.config.eps * g.sign() for part, g in zip((d, x), gradients, strict=True))
        logits = self.forward(images)
        noisy = F.cross_entropy(self.noisy_forward(images, d, x), labels)
        return F.cross_entropy(logits, labels) + self.config.noisy_share * noisy, logits


@dataclass(frozen=True)
class NoisyTuning(TuningConfig):
    """BAN's fine-tuning; 100 updates are 25 epochs of 500 images."""

    title: ClassVar[str] = "BAN"
    loop: ClassVar[type[TuningLoop]] = NoisyTuningLoop
    iterations: int = setting(100, "updates", Range(1, 1e9), flag="--nb-iter")
    lr: float = setting(0.005, "learning rate", Range(0, open_low=True))
    eps: float = setting(0.3, "size of the noise relative to the weights", Range(0), "--ban-eps")
    noisy_share: float = setting(0.5, "weight of the loss under noise", Range(0), "--ban-lambda")

    def learning_rate(self, iteration: int) -> float:
        """See ``TuningConfig``; it stays the same."""
        return self.lr
