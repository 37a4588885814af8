"""Adversarial Neuron Pruning: learn a mask for each neuron while the neurons are adversarially perturbed.

Wu & Wang, *Adversarial Neuron Pruning Purifies Backdoored Deep Models*, NeurIPS 2021, algorithm 1:

    min over m in [0, 1]^n of  alpha * CE(m*w, b) + (1 - alpha) * max over d, x in [-eps, eps]^n of CE((m+d)*w, (1+x)*b)

w and b are the scales and shifts of the BatchNorms. m, d and x are vectors over all n neurons of the network.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.seeding import seeded_generator
from defenses.cuda_graph import replayed
from models.noisy_batchnorm import NoisyBatchNorm, noisy_layers

Transform = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class AnpConfig:
    """Settings of the mask optimisation; the defaults are the paper's.

    Attributes:
        eps: size of the perturbation relative to the weights, at least 0; 0 leaves the natural loss alone.
        steps: ascent steps of the perturbation, at least 1.
        alpha: weight of the natural loss, 0..1.
        lr: learning rate of the masks, above 0.
        momentum: of the masks' SGD, 0 or more and below 1.
        iterations: number of mask updates, at least 1.
        batch_size: images in a batch, at least 2, drawn with replacement.
        project: keep the perturbation inside the eps-ball as the paper writes it; the release, from which the
            published numbers come, lets it reach 2 * eps.
        seed: decides batches, augmentation and the perturbation's start.
        precision: data type of convolutions and linear layers, float32 or bfloat16; masks stay float32.

    Raises:
        ValueError: a value is out of its range.
    """

    eps: float = 0.4
    steps: int = 1
    alpha: float = 0.2
    lr: float = 0.2
    momentum: float = 0.9
    iterations: int = 2000
    batch_size: int = 128
    project: bool = False
    seed: int = 0
    precision: torch.dtype = torch.float32

    def __post_init__(self):
        ranges = {
            "eps": self.eps >= 0,
            "steps": self.steps >= 1,
            "alpha": 0 <= self.alpha <= 1,
            "lr": self.lr > 0,
            "momentum": 0 <= self.momentum < 1,
            "iterations": self.iterations >= 1,
            "batch_size": self.batch_size >= 2,
        }
        for name, in_range in ranges.items():
            if not in_range:
                raise ValueError(f"AnpConfig.{name} = {getattr(self, name)} is out of range")


@dataclass
class AnpState:
    """Where an optimisation stands; saved between iterations, it resumes exactly.

    Attributes:
        iteration: updates made so far.
        mask, momentum: float32 (n,) over all neurons, in state_dict order.
    """

    iteration: int
    mask: Tensor
    momentum: Tensor

    @classmethod
    def start(cls, network: nn.Module) -> "AnpState":
        """Return the state before the first update: the masks the network carries (1), no momentum."""
        mask = torch.cat([layer.mask for layer in noisy_layers(network).values()])
        return cls(0, mask, torch.zeros_like(mask))


@dataclass(frozen=True)
class AnpStep:
    """What one iteration saw, as 0-dimensional tensors on the network's device (reading them waits for it).

    Attributes:
        iteration: counted from 1.
        loss, natural_loss, perturbed_loss: of this batch, before the update.
        accuracy: of the unperturbed masked network on this batch, 0..1.
    """

    iteration: int
    loss: Tensor
    natural_loss: Tensor
    perturbed_loss: Tensor
    accuracy: Tensor


def _assign(layers: list[NoisyBatchNorm], mask: Tensor, noise: tuple[Tensor, Tensor] | None = None) -> None:
    """Hand every layer its part of the vectors m and (d, x)."""
    sizes = [layer.num_features for layer in layers]
    for layer, part in zip(layers, mask.split(sizes), strict=True):
        layer.mask, layer.perturbed = part, noise is not None
    if noise is not None:
        for layer, d, x in zip(layers, noise[0].split(sizes), noise[1].split(sizes), strict=True):
            layer.weight_noise, layer.bias_noise = d, x


def set_masks(network: nn.Module, mask: Tensor) -> None:
    """Copy a vector of all masks, float32 (n,), into the layers of a converted network."""
    _assign(list(noisy_layers(network).values()), mask.clone())


def _ascend(loss_of: Callable, mask: Tensor, noise: tuple[Tensor, Tensor], config: AnpConfig) -> tuple[Tensor, Tensor]:
    """Equation 4: sign-gradient ascent of the perturbed loss from a random start."""
    for _ in range(config.steps):
        noise = tuple(part.detach().requires_grad_() for part in noise)
        loss, _ = loss_of(mask, noise)
        gradients = torch.autograd.grad(loss, noise)
        noise = tuple(part + config.eps / config.steps * g.sign() for part, g in zip(noise, gradients, strict=True))
        if config.project:
            noise = tuple(part.clamp(-config.eps, config.eps) for part in noise)
    return tuple(part.detach() for part in noise)


def _iterate(network: nn.Module, config: AnpConfig, state: AnpState, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One iteration of algorithm 1: update ``state.mask`` and ``state.momentum`` in place, without a host sync.

    ``batch`` holds images (B, ...), labels (B,) and the start of the perturbation, d and x, (n,) each.
    """
    images, labels, *noise = batch
    layers = list(noisy_layers(network).values())

    def loss_of(mask, noise=None):
        _assign(layers, mask, noise)
        with torch.autocast(images.device.type, config.precision, config.precision != torch.float32):
            logits = network(images).float()
        return F.cross_entropy(logits, labels), logits

    if config.eps > 0:
        noise = _ascend(loss_of, state.mask, tuple(noise), config)
    mask = state.mask.detach().requires_grad_()
    natural_loss, logits = loss_of(mask)
    (gradient,) = torch.autograd.grad(natural_loss, mask)
    loss = perturbed_loss = natural_loss.detach()
    if config.eps > 0:
        perturbed_loss, _ = loss_of(mask, noise)
        (perturbed_gradient,) = torch.autograd.grad(perturbed_loss, mask)
        gradient = config.alpha * gradient + (1 - config.alpha) * perturbed_gradient
        loss = config.alpha * loss + (1 - config.alpha) * perturbed_loss.detach()
    with torch.no_grad():
        state.momentum.mul_(config.momentum).add_(gradient)
        state.mask.sub_(config.lr * state.momentum).clamp_(0, 1)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return loss, natural_loss.detach(), perturbed_loss.detach(), accuracy


def draw_batch(
    images: Tensor, labels: Tensor, state: AnpState, config: AnpConfig, transform: Transform | None
) -> tuple[Tensor, ...]:
    """Draw what one iteration needs: images (B, ...), labels (B,), and the perturbation's start d and x, (n,) each.

    It depends on ``config.seed`` and ``state.iteration`` alone. Arguments as for ``optimize_masks``.
    """
    generator = seeded_generator(config.seed, "mask iteration", state.iteration, device=images.device)
    index = torch.randint(len(labels), (config.batch_size,), generator=generator, device=images.device)
    batch = images[index] if transform is None else transform(images[index], generator)
    noise = torch.rand(2, len(state.mask), generator=generator, device=images.device)
    return batch, labels[index], *(config.eps * (2 * noise - 1))


def optimize_masks(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: AnpConfig,
    transform: Transform | None = None,
    state: AnpState | None = None,
) -> Iterator[AnpStep]:
    """Learn the neuron masks of a converted network from a few clean images (algorithm 1 of the paper).

    After every step the masks are in the network's ``NoisyBatchNorm`` layers and in ``state``, and the network is in
    eval mode. Nothing else of it changes, running statistics included: all its parameters are frozen. Within a step
    BatchNorms use the statistics of the batch, everything else (dropout) is in eval mode.

    Args:
        network: what ``models.convert_noisy_batchnorm`` returned.
        images: the defender's clean images, on the network's device.
        labels: their classes.
        config: the settings.
        transform: ``transform(batch, generator)`` makes the network's input from a batch of ``images``: augmentation,
            normalisation. None: the images are the input.
        state: where to go on; it is updated in place. None: from the start.

    Shape:
        images: (N, ...), any dtype that ``transform`` or the network takes. labels: int64 (N,).

    Yields:
        One ``AnpStep`` an iteration.

    Raises:
        ValueError: the network was not converted, or images and labels do not match.
    """
    if not noisy_layers(network):
        raise ValueError("the network has no NoisyBatchNorm; pass it through convert_noisy_batchnorm first")
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    state = AnpState.start(network) if state is None else state
    layers = list(noisy_layers(network).values())
    network.requires_grad_(False).eval()
    set_masks(network, state.mask)
    iterate = None
    while state.iteration < config.iterations:
        batch = draw_batch(images, labels, state, config, transform)
        for layer in layers:
            layer.train()
        iterate = iterate or replayed(lambda batch: _iterate(network, config, state, batch), state, batch)
        values = iterate(batch)
        network.eval()
        set_masks(network, state.mask)
        state.iteration += 1
        yield AnpStep(state.iteration, *values)


def apply_masks(network: nn.Module, noisy: nn.Module) -> nn.Module:
    """Return a copy of a network whose BatchNorm scales are multiplied by learnt masks.

    Args:
        network: the network as it came.
        noisy: its converted copy, with masks.
    """
    masked = copy.deepcopy(network)
    with torch.no_grad():
        for name, layer in noisy_layers(noisy).items():
            masked.get_submodule(name).weight.mul_(layer.mask)
    return masked
