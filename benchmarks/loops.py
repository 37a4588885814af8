"""The loops that benchmarks.speed times: each step the plain way and this project's way, side by side."""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice, repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attacks import InputAwareAllToAll
from attacks.clean_label import pgd_batch
from attacks.pgd import pgd
from benchmarks.plain import PlainMasks, plain_evaluate, plain_loader, plain_train
from data.augment import make_transform
from data.datasets import Dataset, ImageSet
from data.split import attacker_index, defender_index
from defenses import AnpConfig, optimize_masks
from defenses.anp import hold_frozen
from engine.cost import cost
from engine.evaluation import evaluate, evaluation_batch, inference_copy
from engine.runtime import Runtime
from engine.training import SgdLoop, TrainConfig
from formats.subject import SubjectConfig
from models import convert_noisy
from utils.errors import InputError

ENDLESS = 10**6  # epochs
FOLDED_BATCHES = 5  # of an evaluation at least, since a network is folded once for many batches


class Setup(NamedTuple):
    """What every loop is made of.

    Attributes:
        dataset: on the device.
        network: in eval mode, on the device, channels last; the loops of a step may change it.
        runtime: where and how to compute.
        permutation: int64 (N,), the split of the training images.
        batch_size: of training and masks.
        batches: in a stretch.
        seed: of batches and augmentation.
        mask_seeds: how many seeds of the masks are learnt at once.
    """

    dataset: Dataset
    network: nn.Module
    runtime: Runtime
    permutation: Tensor
    batch_size: int
    batches: int
    seed: int
    mask_seeds: int = 1

    @property
    def flops(self) -> int:
        """FLOPs of the network's forward pass over one image."""
        return cost(self.network, (3, *self.dataset.train.images.shape[1:3]))["flops"]

    def attacker(self) -> ImageSet:
        """Return the attacker's images, as many as fill whole batches; raises ``InputError`` where there is none."""
        index = attacker_index(self.permutation)
        whole = len(index) - len(index) % self.batch_size
        if not whole:
            raise InputError(
                f"--batch-size {self.batch_size}: step 1 has only {len(index)} images; use smaller batches"
            )
        return self.dataset.train[index[:whole]]

    def on_device(self, loader: Iterable) -> Iterator[list[Tensor]]:
        """Yield the batches of a plain loader on the device."""
        return ([part.to(self.runtime.device) for part in batch] for batch in loader)


class Loops(NamedTuple):
    """The loops of one step, each a stretch of ``images`` images in batches of ``batch``, and what they compute.

    ``flops`` are those of a forward pass over one image; the passes say how often the loop makes it, a gradient with
    respect to the input and one with respect to the weights counting as a pass each. ``plain`` may be missing.
    """

    plain: Callable[[], object] | None
    fast: Callable[[], object]
    batch: int
    images: int
    flops: float
    plain_passes: int
    fast_passes: int


def take(steps: Iterable, count: int) -> None:
    """Carry out the next steps of a loop."""
    deque(islice(steps, count), maxlen=0)


def step_1(setup: Setup) -> Loops:
    """Training."""
    train, normalization = setup.attacker(), setup.dataset.normalization
    plain = copy.deepcopy(setup.network).to(memory_format=torch.contiguous_format)
    loader = plain_loader(train.to("cpu"), normalization, train=True, batch_size=setup.batch_size)
    batches = setup.on_device(chain.from_iterable(repeat(loader)))
    config = TrainConfig(ENDLESS, setup.batch_size, seed=setup.seed, precision=setup.runtime.precision)
    flops = setup.flops
    steps = SgdLoop(setup.network, train, normalization, setup.dataset.flip, config).steps()
    return Loops(
        lambda: plain_train(plain, islice(batches, setup.batches)),
        lambda: take(steps, setup.batches),
        setup.batch_size,
        setup.batches * setup.batch_size,
        flops,
        3,
        3,
    )


def step_2(setup: Setup) -> Loops:
    """Mask optimisation: three passes forward and back, the plain loop's with weight gradients."""
    clean = setup.dataset.train[defender_index(setup.permutation, SubjectConfig.val_frac)]
    normalization, device = setup.dataset.normalization, setup.runtime.device
    config = AnpConfig(
        iterations=10**9, batch_size=setup.batch_size, seed=setup.seed, precision=setup.runtime.precision
    )
    plain, noisy = PlainMasks(setup.network, config), convert_noisy(setup.network)
    plain.network.to(memory_format=torch.contiguous_format)
    hold_frozen(noisy, config.precision)
    neurons = len(plain.mask())
    loader = plain_loader(clean.to("cpu"), normalization, train=True, batch_size=setup.batch_size, endless=True)
    batches = setup.on_device(loader)
    transform = make_transform(normalization, setup.dataset.flip)
    configs = [replace(config, seed=config.seed + number) for number in range(setup.mask_seeds)]
    steps = optimize_masks(noisy, clean.images, clean.labels, configs, transform)

    def run_plain():
        for images, labels in islice(batches, setup.mask_seeds * setup.batches):
            plain.iterate(images, labels, config.eps * (2 * torch.rand(2, neurons, device=device) - 1))

    images = setup.mask_seeds * setup.batches * setup.batch_size
    return Loops(run_plain, lambda: take(steps, setup.batches), setup.batch_size, images, setup.flops, 9, 6)


def step_3(setup: Setup) -> Loops:
    """Evaluation of one pruned network; folding is part of every row of the sweep. Plain batches are as in step 1."""
    test, normalization, precision = setup.dataset.test, setup.dataset.normalization, setup.runtime.precision
    batch = evaluation_batch(test.images.shape[1:3])
    count = min(max(setup.batches, FOLDED_BATCHES) * batch, len(test))
    images = test[torch.arange(count)]
    plain = copy.deepcopy(setup.network).to(memory_format=torch.contiguous_format)
    loader = plain_loader(images.to("cpu"), normalization, train=False, batch_size=setup.batch_size)
    return Loops(
        lambda: plain_evaluate(plain, setup.on_device(loader)),
        lambda: evaluate(inference_copy(setup.network, precision), images, normalization, precision, batch),
        batch,
        count,
        setup.flops,
        1,
        1,
    )


def clean_label(setup: Setup) -> Loops:
    """One PGD step of every image of a batch."""
    folded = inference_copy(setup.network, setup.runtime.precision).requires_grad_(False)
    count = min(pgd_batch(setup.runtime.device), len(setup.dataset.train))
    images = setup.dataset.train[torch.arange(count)]
    settings = setup.dataset.normalization, 16.0, setup.batches, 1.5, setup.runtime.precision

    def run():
        take(pgd(folded, images, *settings), setup.batches)

    return Loops(None, run, count, setup.batches * count, setup.flops, 0, 2)


def input_aware(jointly: bool) -> Callable[[Setup], Loops]:
    """Return the loop of the input-aware attack's mask generator, or of classifier and pattern generator."""

    def prepare(setup: Setup) -> Loops:
        config = TrainConfig(
            ENDLESS, setup.batch_size, 0.01, milestones=(), seed=setup.seed, precision=setup.runtime.precision
        )
        network, attack = setup.flops, InputAwareAllToAll()
        loop = attack.make_loop(setup.network, attack.poison(setup.attacker()), setup.dataset, config)
        loop.done = jointly * loop.mask_epochs * loop.batches
        steps = loop.steps()
        generator = setup._replace(network=loop.mask_net.eval()).flops
        # masks: two images; jointly: a tenth and a tenth of the batch through both generators, one of them trained
        flops = 3 * network + 0.2 * 4 * generator if jointly else 2 * 3 * generator
        images = setup.batches * setup.batch_size
        return Loops(None, lambda: take(steps, setup.batches), setup.batch_size, images, flops, 0, 1)

    return prepare


STEPS: dict[str, tuple[str, Callable[[Setup], Loops]]] = {  # by name: title in the result files, and what makes it
    "step-1": ("step 1, train", step_1),
    "step-2": ("step 2, masks", step_2),
    "step-3": ("step 3, prune", step_3),
    "clean-label": ("clean-label, one PGD step", clean_label),
    "iab-masks": ("input-aware, mask generator", input_aware(jointly=False)),
    "iab-joint": ("input-aware, classifier and pattern generator", input_aware(jointly=True)),
}
