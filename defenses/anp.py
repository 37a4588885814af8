"""Adversarial Neuron Pruning: learn a mask for each neuron while the neurons are adversarially perturbed.

Wu & Wang, *Adversarial Neuron Pruning Purifies Backdoored Deep Models*, NeurIPS 2021, algorithm 1:

    min over m in [0, 1]^n of  alpha * CE(m*w, b) + (1 - alpha) * max over d, x in [-eps, eps]^n of CE((m+d)*w, (1+x)*b)

w and b are the scales and shifts of the BatchNorms, or what ``models.neuron_layers`` names in a network without any.
m, d and x are vectors over all n neurons of the network. R optimisations of one network, which differ in seed, eps or
alpha, can run together: one pass over R * B images, and a row of m, d and x for each of them.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import Transform, make_transform
from engine.cuda_graph import replayed
from engine.drive import UNTRAINED_REMEDY, Means
from engine.runtime import autocast
from formats.subject import Subject
from models.neuron_layers import along_first
from models.neurons import Neuron, mask_values, neurons_up_to
from models.noisy_layers import NoisyBatchNorm, NoisyLayer, convert_noisy, noisy_layers
from utils.config import Config, Range, checked, one_of, setting
from utils.errors import InputError
from utils.seeding import seeded_generator

COLUMNS = {
    "iteration": "9d",
    "loss": "8.4f",
    "natural loss": "8.4f",
    "perturbed loss": "8.4f",
    "batch acc %": "8.2f",
    "C-Acc %": "7.2f",
    "ASR %": "7.2f",
    "masks <= 0.2": "6d",
    "seconds": "8.0f",
}


@dataclass(frozen=True)
class AnpConfig(Config):
    """Settings of the mask optimisation; the defaults are the paper's.

    Attributes:
        momentum: of the masks' SGD.
        precision: data type of convolutions and linear layers, float32 or bfloat16; masks stay float32.

    The other attributes are described where they are declared.

    Raises:
        ValueError: a value is out of its range.
    """

    lr: float = setting(0.2, "learning rate of the masks", Range(0, open_low=True))
    iterations: int = setting(2000, "mask updates", Range(1, 1e9), flag="--nb-iter")
    batch_size: int = setting(128, "images in a batch, drawn with replacement", Range(2, 100_000))
    eps: float = setting(
        0.4,
        "size of the perturbation relative to the weights; at 0 only the natural loss is used",
        Range(0),
        flag="--anp-eps",
    )
    steps: int = setting(1, "ascent steps of the perturbation", Range(1, 1e9), flag="--anp-steps")
    alpha: float = setting(0.2, "weight of the natural loss", Range(0, 1), flag="--anp-alpha")
    project: bool = setting(
        False,
        "keep the perturbation inside the eps-ball, as the paper writes it; the published numbers come from letting "
        "it reach 2 * eps",
        flag="--anp-project",
    )
    seed: int = setting(0, "decides batches, augmentation and the perturbation's start", Range(0))
    momentum: float = checked(0.9, Range(0, 1, open_high=True))
    precision: torch.dtype = one_of(torch.float32, torch.bfloat16)


@dataclass
class AnpState:
    """Where an optimisation stands; saved between iterations, it resumes exactly.

    Attributes:
        iteration: updates made so far.
        mask, momentum: float32 (R, n): a row for each run, over all neurons in state_dict order.
    """

    iteration: int
    mask: Tensor
    momentum: Tensor

    @classmethod
    def start(cls, network: nn.Module, runs: int = 1) -> "AnpState":
        """Return the state before the first update: the masks the network carries (1), no momentum.

        Raises:
            InputError: several runs, and a layer with neurons that is no plain BatchNorm.
        """
        layers = noisy_layers(network)
        for name, layer in layers.items() if runs > 1 else ():
            if not isinstance(layer, NoisyBatchNorm) or len(noisy_layers(layer)) > 1:
                raise InputError(
                    f"{name}: several seeds at once need BatchNorms that hold no other neurons; learn the masks of one "
                    "seed after the other"
                )
        mask = torch.cat([layer.mask for layer in layers.values()], -1).expand(runs, -1).clone()  # (R, n)
        return cls(0, mask, torch.zeros_like(mask))


@dataclass(frozen=True)
class AnpStep:
    """What one iteration saw, as tensors (R,) on the network's device (reading them waits for it).

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


def assign(layers: list[NoisyLayer], mask: Tensor, noise: tuple[Tensor, Tensor] | None = None) -> None:
    """Let every layer see its part of the vectors m and (d, x), all (n,) or (R, n); nothing is copied."""
    sizes = [len(layer._parameters["weight"]) for layer in layers]
    for layer, part in zip(layers, mask.split(sizes, -1), strict=True):
        layer.mask, layer.perturbed = part, noise is not None  # (C,) or (R, C)
    if noise is not None:
        for layer, d, x in zip(layers, noise[0].split(sizes, -1), noise[1].split(sizes, -1), strict=True):
            layer.weight_noise, layer.bias_noise = d, x  # (C,) or (R, C) each


def show_masks(network: nn.Module, mask: Tensor) -> None:
    """Make the layers of a converted network look at masks, which they follow from then on.

    Args:
        network: what ``models.convert_noisy`` returned.
        mask: a state's masks, or a row of them: those of one run.

    Shape:
        mask: float32 (n,) or (R, n).
    """
    assign(list(noisy_layers(network).values()), mask.squeeze(0))  # one run needs no dimension for runs


def _each(function: Callable[..., Tensor], *parts: Sequence) -> Tensor:
    """Apply a function to what belongs to each run; the results are the rows of one tensor."""
    return torch.stack([function(*part) for part in zip(*parts, strict=True)])


def _climb(config: AnpConfig, noise: Tensor, gradient: Tensor) -> Tensor:
    """One step of one run's ascent: d + eps/steps * sign(dCE/dd), float32 (n,)."""
    noise = noise + config.eps / config.steps * gradient.sign()
    return noise.clamp(-config.eps, config.eps) if config.project else noise


def ascend(
    loss_of: Callable, mask: Tensor, noise: tuple[Tensor, Tensor], configs: Sequence[AnpConfig]
) -> tuple[Tensor, Tensor]:
    """Equation 4: sign-gradient ascent of the perturbed loss from a random start.

    d <- d + eps/steps * sign(dCE/dd), x likewise. Starting inside the eps-ball, it may end as far as 2 * eps away.

    Args:
        loss_of: ``loss_of(mask, noise)`` returns the perturbed loss of each run, float32 (R,), and something else.
        mask: handed to it.
        noise: where the ascent starts, d and x.
        configs: settings of each run; ``eps`` and ``project`` may differ, ``steps`` is the first one's.

    Shape:
        mask, d, x: float32 (R, n).

    Returns:
        d and x at the end.
    """
    for _ in range(configs[0].steps):
        noise = tuple(part.detach().requires_grad_() for part in noise)
        loss, _ = loss_of(mask, noise)
        gradients = torch.autograd.grad(loss.sum(), noise, materialize_grads=True)  # 0 for x where no layer has a bias
        noise = tuple(_each(_climb, configs, *pair) for pair in zip(noise, gradients, strict=True))
    return tuple(part.detach() for part in noise)


def _mix(config: AnpConfig, natural: Tensor, perturbed: Tensor) -> Tensor:
    """Equation 3 for one run's loss () or gradient (n,)."""
    return config.alpha * natural + (1 - config.alpha) * perturbed


def _iterate(
    network: nn.Module, configs: Sequence[AnpConfig], state: AnpState, batch: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """One iteration of algorithm 1: update ``state.mask`` and ``state.momentum`` in place, without a host sync.

    ``batch`` is what ``draw_batches`` returned. Returns loss, natural loss, perturbed loss and accuracy, (R,) each.
    """
    images, labels, *noise = batch
    config, runs = configs[0], len(configs)  # they share all but eps, alpha and seed
    layers = list(noisy_layers(network).values())

    def loss_of(mask, noise=None):
        assign(layers, mask.squeeze(0), noise and [part.squeeze(0) for part in noise])
        with autocast(images.device, config.precision):
            logits = network(images).float()  # (R * B, classes)
        return _each(F.cross_entropy, logits.chunk(runs), labels.chunk(runs)), logits  # (R,)

    # The inner maximum: the noise at which the masked network is worst (equation 4). Masks do not move here.
    perturbs = any(each.eps > 0 for each in configs)
    if perturbs:
        noise = ascend(loss_of, state.mask, tuple(noise), configs)
    # The outer minimum: alpha * CE(m*w, b) + (1-alpha) * CE((m+d)*w, (1+x)*b) (equation 3). Only masks have a
    # gradient; two backward passes, one after the other, need half the memory of one through the sum.
    mask = state.mask.detach().requires_grad_()  # (R, n); the gradient of a sum over runs has each run's in its row
    natural_loss, logits = loss_of(mask)
    (gradient,) = torch.autograd.grad(natural_loss.sum(), mask)
    loss = perturbed_loss = natural_loss.detach()
    if perturbs:
        perturbed_loss, _ = loss_of(mask, noise)
        (perturbed_gradient,) = torch.autograd.grad(perturbed_loss.sum(), mask)
        gradient = _each(_mix, configs, gradient, perturbed_gradient)
        loss = _each(_mix, configs, loss, perturbed_loss.detach())
    # SGD with momentum, then back into [0, 1]^n
    with torch.no_grad():
        state.momentum.mul_(config.momentum).add_(gradient)
        state.mask.sub_(config.lr * state.momentum).clamp_(0, 1)
    accuracy = (logits.argmax(1) == labels).float().view(runs, -1).mean(1)
    return loss, natural_loss.detach(), perturbed_loss.detach(), accuracy


def draw_batch(
    images: Tensor, labels: Tensor, neurons: int, config: AnpConfig, iteration: int, transform: Transform | None = None
) -> tuple[Tensor, ...]:
    """Draw what one iteration needs; it depends on ``config.seed`` and ``iteration`` alone.

    Args:
        images, labels, config, transform: as for ``optimize_masks``.
        neurons: their number n.
        iteration: updates made before.

    Returns:
        Images (B, ...), labels (B,), and the start of the perturbation, d and x, uniform in -eps..eps, (n,) each.
    """
    generator = seeded_generator(config.seed, "mask iteration", iteration, device=images.device)
    index = torch.randint(len(labels), (config.batch_size,), generator=generator, device=images.device)
    batch = images[index] if transform is None else transform(images[index], generator)
    noise = torch.rand(2, neurons, generator=generator, device=images.device)  # 0..1
    return batch, labels[index], *(config.eps * (2 * noise - 1))


def draw_batches(
    images: Tensor,
    labels: Tensor,
    neurons: int,
    configs: Sequence[AnpConfig],
    iteration: int,
    transform: Transform | None = None,
) -> tuple[Tensor, ...]:
    """Draw what one iteration of R runs needs, for each of them as ``draw_batch`` does.

    Returns:
        Images (R * B, ...) and labels (R * B,), run after run, and d and x, (R, n) each.
    """
    drawn = [draw_batch(images, labels, neurons, config, iteration, transform) for config in configs]
    batches, batch_labels, *noise = zip(*drawn, strict=True)
    return torch.cat(batches), torch.cat(batch_labels), *map(torch.stack, noise)


def runs_of(config: AnpConfig | Sequence[AnpConfig]) -> list[AnpConfig]:
    """Return the settings of each run; raises ``ValueError`` where runs differ in more than seed, eps and alpha."""
    configs = [config] if isinstance(config, AnpConfig) else list(config)
    if not configs:
        raise ValueError("no settings: expected an AnpConfig for each run")
    first = configs[0]
    if any(replace(each, seed=first.seed, eps=first.eps, alpha=first.alpha) != first for each in configs):
        raise ValueError("runs that go together may differ in seed, eps and alpha alone")
    return configs


@torch.no_grad()
def _check_apart(network: nn.Module, images: Tensor, config: AnpConfig, runs: int) -> None:
    """Make sure that what a network answers to the images of one run depends on no other run.

    Raises:
        InputError: it does.
    """
    size = len(images) // runs
    others = images.clone()  # in the same memory format, so that the same kernels run
    others[:size] = images[0]  # another first run
    with autocast(images.device, config.precision):
        before, after = (network(batch)[size:] for batch in (images, others))
    if not torch.allclose(before, after, rtol=0, atol=0, equal_nan=True):
        raise InputError(
            f"{type(network).__name__} mixes the images of a batch in more than its BatchNorms; learn the masks of one "
            "seed after the other"
        )


def optimize_masks(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    config: AnpConfig | Sequence[AnpConfig],
    transform: Transform | None = None,
    state: AnpState | None = None,
) -> Iterator[AnpStep]:
    """Learn the neuron masks of a converted network from a few clean images (algorithm 1 of the paper).

    After every step the masks are in the network's ``NoisyLayer``s and in ``state``, and the network is in
    eval mode. Nothing else of it changes, running statistics included: all its parameters are frozen. Within a step
    BatchNorms use the statistics of the batch, everything else (dropout) is in eval mode.

    Several settings are several runs at once, each with the batches, the statistics and the masks that it would have
    alone, up to rounding. Their masks are the rows of ``state.mask``; the layers show all rows, and those of run r
    after ``show_masks(network, state.mask[r])``.

    Args:
        network: what ``models.convert_noisy`` returned.
        images: the defender's clean images, on the network's device.
        labels: their classes.
        config: the settings; of several runs, which may differ in seed, eps and alpha, one for each.
        transform: ``transform(batch, generator)`` makes the network's input from a batch of ``images``: augmentation,
            normalisation. None: the images are the input.
        state: where to go on; it is updated in place. None: from the start.

    Shape:
        images: (N, ...), any dtype that ``transform`` or the network takes. labels: int64 (N,).

    Yields:
        One ``AnpStep`` an iteration.

    Raises:
        ValueError: the network was not converted, images and labels do not match, images are not finite, or the
            settings of several runs do not go together.
        InputError: several runs, and the network has no BatchNorms or mixes images otherwise.
    """
    configs = runs_of(config)
    if not noisy_layers(network):
        raise ValueError("the network has no NoisyLayer; pass it through convert_noisy first")
    if len(images) != len(labels) or not len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    if transform is None and not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; without a transform they have to be the network's input")
    if images.is_floating_point() and not bool(torch.isfinite(images).all()):
        raise ValueError("images hold NaN or infinite values")
    if labels.dtype != torch.int64 or labels.dim() != 1 or bool((labels < 0).any()):
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}; expected int64 (N,), 0 or more")
    state = AnpState.start(network, len(configs)) if state is None else state
    layers = list(noisy_layers(network).values())
    network.requires_grad_(False).eval()
    show_masks(network, state.mask)
    iterate = None
    while state.iteration < configs[0].iterations:
        with torch.inference_mode(False), torch.enable_grad():  # whatever the caller has set
            batch = draw_batches(images, labels, state.mask.shape[1], configs, state.iteration, transform)
        for layer in layers:
            # of a BatchNorm alone: its children, such as the dropout of timm's BatchNormAct2d, stay in eval mode
            layer.training = isinstance(layer, NoisyBatchNorm)
        changed = state.mask, state.momentum
        with torch.inference_mode(False), torch.enable_grad():
            if iterate is None and len(configs) > 1:
                _check_apart(network, batch[0], configs[0], len(configs))
            iterate = iterate or replayed(lambda batch: _iterate(network, configs, state, batch), changed, batch)
            values = iterate(batch)
        network.eval()
        show_masks(network, state.mask)
        state.iteration += 1
        yield AnpStep(state.iteration, *values)


def hold_frozen(noisy: nn.Module, precision: torch.dtype) -> None:
    """Hold the frozen weights of convolutions and linear layers in the data type in which they compute.

    Autocast would round them anew in every pass; the results are the same to the last bit.

    Args:
        noisy: a converted network, changed in place. Layers with masks stay as they are.
        precision: data type of convolutions and linear layers.
    """
    shared = Counter(id(part) for layer in noisy.modules() for part in layer._parameters.values())
    for layer in noisy.modules():
        is_plain = type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # others may compute with their weights
        if is_plain and all(part is None or shared[id(part)] == 1 for part in layer._parameters.values()):
            layer.to(precision)


def apply_masks(network: nn.Module, noisy: nn.Module) -> nn.Module:
    """Return a copy of a network whose neurons' weights are multiplied by learnt masks.

    Args:
        network: the unconverted network.
        noisy: its converted copy, with masks.
    """
    masked = copy.deepcopy(network)
    with torch.no_grad():
        for name, layer in noisy_layers(noisy).items():
            weight = masked.get_submodule(name).weight
            weight.mul_(along_first(layer.mask, weight))
    return masked


class MaskLoop:
    """The mask optimisation as something that ``engine.drive.drive`` drives.

    Args:
        subject: the defender's view.
        config: the settings; of several runs at once, one for each.
        row_every: iterations between two rows of the log.

    Attributes:
        configs: the settings of each run.
        noisy: the converted network; its layers show the masks learnt so far.
        state: where the optimisation stands.

    Raises:
        ValueError: the network has no neuron to mask, or the settings of several runs do not go together.
        InputError: as ``AnpState.start``.
    """

    title, unit = "masks", "iteration"

    def __init__(self, subject: Subject, config: AnpConfig | Sequence[AnpConfig], row_every: int = 500):
        self.subject, self.configs, self.row_every = subject, runs_of(config), row_every
        self.transform = make_transform(subject.normalization, subject.flip)
        self.noisy = convert_noisy(subject.network)
        hold_frozen(self.noisy, self.configs[0].precision)
        self.state = AnpState.start(self.noisy, len(self.configs))
        self.means = Means(4, self.state.mask.device)  # loss, natural loss, perturbed loss, accuracy
        self.total = self.configs[0].iterations
        self.columns = COLUMNS if len(self.configs) == 1 else {**COLUMNS, "masks <= 0.2": "8.1f"}  # a mean

    @property
    def done(self) -> int:
        """Updates made so far."""
        return self.state.iteration

    @property
    def remedy(self) -> str:
        """What to do where the loss is not finite."""
        return "the masks diverged; lower --lr or --anp-eps" if self.done else UNTRAINED_REMEDY

    def steps(self) -> Iterator[AnpStep]:
        """See ``engine.drive.Loop``."""
        clean = self.subject.clean
        for step in optimize_masks(self.noisy, clean.images, clean.labels, self.configs, self.transform, self.state):
            values = step.loss, step.natural_loss, step.perturbed_loss, step.accuracy
            self.means.add(*(value.mean() for value in values))
            yield step

    def due(self) -> bool:
        """A row belongs at the beginning, after every ``row_every`` iterations, and at the end."""
        return self.done % self.row_every == 0 or self.done == self.total

    def row(self) -> dict[str, Any]:
        """Return the means since the last row and how many neurons would be pruned at 0.2; means over runs, too."""
        loss, natural_loss, perturbed_loss, accuracy = self.means.take()
        runs = len(self.configs)
        small = sum(len(neurons_up_to(self.neurons(run), 0.2)) for run in range(runs))
        return {
            "iteration": self.done,
            "loss": loss,
            "natural loss": natural_loss,
            "perturbed loss": perturbed_loss,
            "batch acc %": accuracy and 100 * accuracy,
            "masks <= 0.2": small if runs == 1 else small / runs,
        }

    def neurons(self, run: int = 0) -> list[Neuron]:
        """Return every neuron with its mask in one run."""
        show_masks(self.noisy, self.state.mask[run])
        return mask_values(self.noisy)

    def masked(self, run: int = 0) -> nn.Module:
        """Return the network with the masks of one run multiplied in."""
        show_masks(self.noisy, self.state.mask[run])
        return apply_masks(self.subject.network, self.noisy)

    def state_dict(self) -> dict[str, Any]:
        """See ``engine.drive.Loop``."""
        state = {"iteration": self.done, "mask": self.state.mask, "momentum": self.state.momentum}
        return {**state, "means": self.means.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``engine.drive.Loop``."""
        self.state.iteration = state["iteration"]
        self.state.mask.copy_(state["mask"])
        self.state.momentum.copy_(state["momentum"])
        self.means.load_state_dict(state["means"])


def score(subject: Subject, config: AnpConfig | None = None) -> list[Neuron]:
    """Learn the mask of every neuron; small masks belong to the backdoor.

    Args:
        subject: the defender's view.
        config: the settings; None for the paper's.

    Returns:
        The neurons in state_dict order.

    Raises:
        ValueError: the network has no neuron to mask.
    """
    loop = MaskLoop(subject, config or AnpConfig())
    for _ in loop.steps():
        pass
    return loop.neurons()
