"""Images per second of the three steps against plain loops, in one run on the machine at hand.

    python -m benchmarks.speed                              # full width, real CIFAR-10, about 5 CPU minutes
    python -m benchmarks.speed --dataset synthetic --widen-factor 0.25

Every figure is the median over --rounds, plain and fast loop taking turns. The share of peak compares the fast loop's
convolution and matrix FLOP/s with one large convolution, measured in the same run and precision.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import RandomSampler
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.plain import PlainMasks, plain_evaluate, plain_loader, plain_train
from data.augment import make_transform
from data.datasets import Dataset, load_dataset
from data.split import attacker_index, defender_index, draw_permutation
from defenses import AnpConfig, AnpState, optimize_masks
from models import build_model, convert_noisy_batchnorm
from utils.arguments import (
    add_compute_arguments,
    add_data_arguments,
    add_model_arguments,
    add_seed_argument,
    make_parser,
    number,
)
from utils.evaluation import EVALUATION_BATCH, evaluate, inference_copy
from utils.run import versions
from utils.runtime import Runtime, prepare_runtime
from utils.training import SgdTrainer, TrainConfig, TrainState

# Passes over the network for each image, in units of a forward pass; weight gradients cost as much as input gradients.
PASSES = {"step 1, train": 3, "step 2, masks": 6, "step 3, prune": 1}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("--batches", type=number(int, 1), default=3, help="batches in a timed stretch, 1 or more")
    parser.add_argument("--rounds", type=number(int, 1), default=3, help="stretches of each loop, 1 or more")
    add_model_arguments(parser, from_card=False)
    add_data_arguments(parser, default_dataset="cifar10", split=False)
    add_seed_argument(parser)
    add_compute_arguments(parser)
    return parser


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long a function takes."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_flops(runtime: Runtime) -> float:
    """Return the FLOP/s of a large convolution, the best of several runs."""
    layer = nn.Conv2d(256, 256, 3, padding=1, bias=False)
    layer = layer.to(runtime.device, runtime.precision, memory_format=torch.channels_last)
    images = torch.randn(64, 256, 32, 32, device=runtime.device, dtype=runtime.precision)
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        best = min(seconds(lambda: layer(images), runtime.device) for _ in range(8))
    return 2 * 64 * 32 * 32 * 256 * 256 * 9 / best


def forward_flops(network: nn.Module, device: torch.device) -> int:
    """Return the FLOPs of one image's forward pass (convolutions and linear layers)."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.randn(1, 3, 32, 32, device=device))
    return counter.get_total_flops()


def step_1(args: argparse.Namespace, dataset: Dataset, network: nn.Module, runtime: Runtime) -> tuple:
    """Return the plain and the fast loop of step 1, and the images in a stretch."""
    train = dataset.train[attacker_index(draw_permutation(len(dataset.train)))]
    plain = build_model(args.arch, dataset.num_classes, args.widen_factor).to(runtime.device)
    loader = plain_loader(train.to("cpu"), dataset.normalization, train=True, batch_size=args.batch_size)
    config = TrainConfig(batch_size=args.batch_size, precision=runtime.precision)
    steps = SgdTrainer(network, train, None, dataset, config).train_epoch(TrainState.start(runtime.device))
    batches = ([part.to(runtime.device) for part in batch] for batch in loader)
    return (
        lambda: plain_train(plain, islice(batches, args.batches)),
        lambda: list(islice(steps, args.batches)),
        args.batches * args.batch_size,
    )


def step_2(args: argparse.Namespace, dataset: Dataset, network: nn.Module, runtime: Runtime) -> tuple:
    """Return the plain and the fast loop of step 2, and the images in a stretch."""
    defender = dataset.train[defender_index(draw_permutation(len(dataset.train)), 0.01)]
    config = AnpConfig(batch_size=args.batch_size, precision=runtime.precision, iterations=10**9)
    plain, noisy = PlainMasks(network, config), convert_noisy_batchnorm(network)
    plain.network.to(memory_format=torch.contiguous_format)
    state = AnpState.start(noisy)
    loader = plain_loader(defender.to("cpu"), dataset.normalization, train=True, batch_size=args.batch_size)
    loader = torch.utils.data.DataLoader(
        loader.dataset, args.batch_size, sampler=RandomSampler(loader.dataset, True, 10**9)
    )
    transform = make_transform(dataset.normalization)

    steps = optimize_masks(noisy, defender.images, defender.labels, config, transform, state)
    batches = ([part.to(runtime.device) for part in batch] for batch in loader)

    def run_plain():
        for images, labels in islice(batches, args.batches):
            plain.iterate(images, labels, torch.rand(2, len(state.mask), device=runtime.device) * 0.8 - 0.4)

    return run_plain, lambda: list(islice(steps, args.batches)), args.batches * args.batch_size


def step_3(args: argparse.Namespace, dataset: Dataset, network: nn.Module, runtime: Runtime) -> tuple:
    """Return the plain and the fast evaluation of step 3, and the images in a stretch."""
    count = 5 * EVALUATION_BATCH  # several batches, since folding comes once a row
    images = dataset.test[torch.arange(count)]
    loader = plain_loader(images.to("cpu"), dataset.normalization, train=False, batch_size=args.batch_size)
    plain = build_model(args.arch, dataset.num_classes, args.widen_factor).to(runtime.device)
    plain.load_state_dict(network.state_dict())

    def run_fast():  # folding is part of every row of the sweep
        evaluate(inference_copy(network, runtime.precision), images, dataset.normalization, runtime.precision)

    def run_plain():
        plain_evaluate(plain, ([part.to(runtime.device) for part in batch] for batch in loader))

    return run_plain, run_fast, count


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    args = build_parser().parse_args(argv)
    runtime = prepare_runtime(args.device, args.precision, args.threads)
    dataset = load_dataset(args.dataset, args.data_dir, runtime.device)
    torch.manual_seed(args.seed)
    peak = peak_flops(runtime)
    print(
        f"{args.arch}, width {args.widen_factor}, batch {args.batch_size}, {runtime.device}, {runtime.precision}, "
        f"{torch.get_num_threads()} threads, {processor(runtime.device)}, torch {versions()['torch']}"
    )
    print(f"one large convolution: {peak / 1e9:.0f} GFLOP/s; median of {args.rounds} rounds")
    print(f"{'':14}  {'plain img/s':>11}  {'fast img/s':>11}  {'speed-up':>8}  {'share of peak':>13}")
    for (name, passes), prepare in zip(PASSES.items(), (step_1, step_2, step_3), strict=True):
        network = build_model(args.arch, dataset.num_classes, args.widen_factor)
        network = network.to(runtime.device, memory_format=torch.channels_last)
        flops = forward_flops(network, runtime.device)
        plain, fast, images = prepare(args, dataset, network, runtime)
        plain(), fast()  # warm-up
        times = [(seconds(plain, runtime.device), seconds(fast, runtime.device)) for _ in range(args.rounds)]
        slow_rate, fast_rate = (images / statistics.median(column) for column in zip(*times, strict=True))
        share = 100 * passes * flops * fast_rate / peak
        print(
            f"{name:14}  {slow_rate:11.1f}  {fast_rate:11.1f}  {fast_rate / slow_rate:7.2f}x  {share:11.0f} %",
            flush=True,
        )
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
