"""Images per second of the three steps against plain loops, in one run on the machine at hand.

    python -m benchmarks.speed                              # full width, real CIFAR-10, about 5 CPU minutes
    python -m benchmarks.speed --dataset synthetic --widen-factor 0.25

Every figure is the median over --rounds, plain and fast loop taking turns. The share of peak compares a loop's
convolution and matrix FLOP/s with one large convolution in the same precision, measured in the same run.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import RandomSampler
from torch.utils.flop_counter import FlopCounterMode

from attacks import InputAwareAllToAll
from attacks.clean_label import PGD_BATCH
from attacks.pgd import pgd
from benchmarks.plain import PlainMasks, plain_evaluate, plain_loader, plain_train
from data.augment import make_transform
from data.datasets import DataConfig, Dataset, SourceConfig, load_dataset
from data.split import attacker_index, defender_index, load_permutation
from defenses import AnpConfig, AnpState, optimize_masks
from engine.evaluation import EVALUATION_BATCH, evaluate, inference_copy
from engine.runtime import Runtime, RuntimeConfig, prepare_runtime
from engine.training import SgdLoop, TrainConfig
from models import ModelConfig, build_model, convert_noisy
from utils.config import Config, Range, add_flags, from_flags, make_parser, setting
from utils.run import versions


@dataclass(frozen=True)
class SpeedConfig(Config):
    """What is timed."""

    batches: int = setting(3, "batches in a timed stretch", Range(1))
    rounds: int = setting(3, "stretches of each loop", Range(1))
    batch_size: int = setting(128, "images in a batch", Range(2))
    seed: int = setting(0, "of weights and batches", Range(0))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark."""
    parser = make_parser(__doc__)
    for config in (SpeedConfig, ModelConfig, DataConfig, SourceConfig, RuntimeConfig):
        add_flags(parser, config)
    return parser


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long a function takes."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_flops(device: torch.device, precision: torch.dtype) -> float:
    """Return the FLOP/s of a large convolution, the best of several runs."""
    layer = nn.Conv2d(256, 256, 3, padding=1, bias=False).to(device, precision, memory_format=torch.channels_last)
    images = torch.randn(64, 256, 32, 32, device=device, dtype=precision)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        best = min(seconds(lambda: layer(images), device) for _ in range(8))
    return 2 * 64 * 32 * 32 * 256 * 256 * 9 / best


class Loops(NamedTuple):
    """The loops of one step, each a stretch of ``images`` images, and what they compute.

    ``flops`` are those of a forward pass over one image; the passes say how often the loop makes it, a gradient with
    respect to the input and one with respect to the weights counting as a pass each.
    """

    plain: Callable[[], object] | None
    fast: Callable[[], object]
    images: int
    flops: int
    plain_passes: float
    fast_passes: float


def stretch(steps: Iterator, batches: int) -> None:
    """Take some steps of an epoch; raises ``ValueError`` where it has no more."""
    if len(list(islice(steps, batches))) < batches:
        raise ValueError("an epoch has fewer batches than --batches times (--rounds + 1); use less of either")


def forward_flops(network: nn.Module, device: torch.device) -> int:
    """Return the FLOPs of one image's forward pass (convolutions and linear layers)."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.randn(1, 3, 32, 32, device=device))  # the size of every dataset here
    return counter.get_total_flops()


def step_1(args: argparse.Namespace, dataset: Dataset, network: nn.Module, runtime: Runtime) -> Loops:
    """Training."""
    train = dataset.train[attacker_index(load_permutation(args.split_file, len(dataset.train)))]
    plain = build_model(args.arch, dataset.num_classes, args.widen_factor).to(runtime.device)
    loader = plain_loader(train.to("cpu"), dataset.normalization, train=True, batch_size=args.batch_size)
    config = TrainConfig(batch_size=args.batch_size, seed=args.seed, precision=runtime.precision)
    loop = SgdLoop(network, train, dataset.normalization, dataset.flip, config)
    steps = islice(loop.steps(), loop.batches)
    batches = ([part.to(runtime.device) for part in batch] for batch in loader)
    return Loops(
        lambda: plain_train(plain, islice(batches, args.batches)),
        lambda: stretch(steps, args.batches),
        args.batches * args.batch_size,
        forward_flops(network, runtime.device),
        3,
        3,
    )


def step_2(args: argparse.Namespace, dataset: Dataset, network: nn.Module, runtime: Runtime) -> Loops:
    """Mask optimisation: three passes forward and back, the plain loop's with weight gradients."""
    defender = dataset.train[defender_index(load_permutation(args.split_file, len(dataset.train)), 0.01)]
    config = AnpConfig(batch_size=args.batch_size, seed=args.seed, precision=runtime.precision, iterations=10**9)
    plain, noisy = PlainMasks(network, config), convert_noisy(network)
    plain.network.to(memory_format=torch.contiguous_format)
    state = AnpState.start(noisy)
    loader = plain_loader(defender.to("cpu"), dataset.normalization, train=True, batch_size=args.batch_size)
    loader = torch.utils.data.DataLoader(
        loader.dataset, args.batch_size, sampler=RandomSampler(loader.dataset, True, 10**9)
    )
    transform = make_transform(dataset.normalization, dataset.flip)

    steps = optimize_masks(noisy, defender.images, defender.labels, config, transform, state)
    batches = ([part.to(runtime.device) for part in batch] for batch in loader)

    def run_plain():
        for images, labels in islice(batches, args.batches):
            plain.iterate(images, labels, torch.rand(2, len(state.mask), device=runtime.device) * 0.8 - 0.4)

    images, flops = args.batches * args.batch_size, forward_flops(network, runtime.device)
    return Loops(run_plain, lambda: stretch(steps, args.batches), images, flops, 9, 6)


def step_3(args: argparse.Namespace, dataset: Dataset, network: nn.Module, runtime: Runtime) -> Loops:
    """Evaluation of one pruned network."""
    count = min(5 * EVALUATION_BATCH, len(dataset.test))  # several batches, since folding comes once a row
    images = dataset.test[torch.arange(count)]
    loader = plain_loader(images.to("cpu"), dataset.normalization, train=False, batch_size=args.batch_size)
    plain = build_model(args.arch, dataset.num_classes, args.widen_factor).to(runtime.device)
    plain.load_state_dict(network.state_dict())

    def run_fast():  # folding is part of every row of the sweep
        evaluate(inference_copy(network, runtime.precision), images, dataset.normalization, runtime.precision)

    def run_plain():
        plain_evaluate(plain, ([part.to(runtime.device) for part in batch] for batch in loader))

    return Loops(run_plain, run_fast, count, forward_flops(network, runtime.device), 1, 1)


def clean_label(args: argparse.Namespace, dataset: Dataset, network: nn.Module, runtime: Runtime) -> Loops:
    """One PGD step of every image of a batch."""
    folded = inference_copy(network, runtime.precision).requires_grad_(False)
    images, flops = dataset.train[torch.arange(PGD_BATCH)], forward_flops(network, runtime.device)
    settings = dataset.normalization, 16.0, args.batches, 1.5, runtime.precision
    return Loops(None, lambda: list(pgd(folded, images, *settings)), args.batches * PGD_BATCH, flops, 0, 2)


def input_aware(phase: int) -> Callable[..., Loops]:
    """Return the loop of the input-aware attack's mask generator (0), or of classifier and pattern generator (1)."""

    def prepare(args: argparse.Namespace, dataset: Dataset, network: nn.Module, runtime: Runtime) -> Loops:
        train = dataset.train[attacker_index(load_permutation(args.split_file, len(dataset.train)))]
        config = TrainConfig(2, args.batch_size, 0.01, milestones=(), seed=args.seed, precision=runtime.precision)
        attack = InputAwareAllToAll()
        loop = attack.make_loop(network, attack.poison(train), dataset, config)
        loop.done = phase * loop.batches
        steps = islice(loop.steps(), loop.batches)
        generator = forward_flops(loop.mask_net.eval(), runtime.device)
        # masks: two images; jointly: a tenth and a tenth of the batch through both generators, one of them trained
        flops = 2 * 3 * generator if phase == 0 else 3 * forward_flops(network, runtime.device) + 0.2 * 4 * generator
        images = args.batches * args.batch_size
        return Loops(None, lambda: stretch(steps, args.batches), images, flops, 0, 1)

    return prepare


ROWS = {
    "step 1, train": step_1,
    "step 2, masks": step_2,
    "step 3, prune": step_3,
    "clean-label, a PGD step": clean_label,
    "input-aware, masks": input_aware(0),
    "input-aware, jointly": input_aware(1),
}


def measure(loops: Loops, rounds: int, device: torch.device) -> tuple[float | None, float]:
    """Return images per second of the plain loop, if there is one, and of the fast loop."""
    todo = [loop for loop in (loops.plain, loops.fast) if loop]
    for loop in todo:
        loop()  # warm-up
    times = [[seconds(loop, device) for loop in todo] for _ in range(rounds)]
    rates = [loops.images / statistics.median(column) for column in zip(*times, strict=True)]
    return rates[0] if loops.plain else None, rates[-1]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    args = build_parser().parse_args(argv)
    runtime = prepare_runtime(from_flags(RuntimeConfig, args))
    dataset = load_dataset(args.dataset, args.data_dir, runtime.device, args.image_size)
    torch.manual_seed(args.seed)
    fp32, peak = (peak_flops(runtime.device, precision) for precision in (torch.float32, runtime.precision))
    print(
        f"{args.arch}, width {args.widen_factor}, batch {args.batch_size}, {runtime.device}, {runtime.precision}, "
        f"{torch.get_num_threads()} threads, {processor(runtime.device)}, torch {versions()['torch']}"
    )
    print(
        f"one large convolution: {fp32 / 1e9:.0f} GFLOP/s in fp32, {peak / 1e9:.0f} in {runtime.precision}; "
        f"median of {args.rounds} rounds"
    )
    print(f"{'':24} {'plain img/s':>11} {'of fp32 peak':>12} {'fast img/s':>11} {'of peak':>8} {'speed-up':>9}")
    for name, prepare in ROWS.items():
        network = build_model(args.arch, dataset.num_classes, args.widen_factor)
        network = network.to(runtime.device, memory_format=torch.channels_last)
        loops = prepare(args, dataset, network, runtime)
        plain, fast = measure(loops, args.rounds, runtime.device)
        cells = ["-", "-", f"{fast:.1f}", f"{100 * loops.fast_passes * loops.flops * fast / peak:.0f} %", "-"]
        if plain:
            share = 100 * loops.plain_passes * loops.flops * plain / fp32
            cells[:2], cells[4] = [f"{plain:.1f}", f"{share:.0f} %"], f"{fast / plain:.2f}x"
        print(f"{name:24} {cells[0]:>11} {cells[1]:>12} {cells[2]:>11} {cells[3]:>8} {cells[4]:>9}", flush=True)
    return 0


def processor(device: torch.device) -> str:
    """Return the name of the CPU or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = (
        [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
