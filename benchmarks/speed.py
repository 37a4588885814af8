"""Images per second of the three steps against plain loops, in one run on the machine at hand.

    python -m benchmarks.speed                              # full width, real CIFAR-10, some CPU minutes
    python -m benchmarks.speed --dataset synthetic --widen-factor 0.25
    python -m benchmarks.speed --steps step-1 step-2 --json speed.json
    python -m benchmarks.speed --profile step-2             # of this step alone, with its ten costliest operators

Every figure is the median over --rounds, plain and fast loop taking turns. The share of peak compares a loop's
convolution and matrix FLOP/s with one large convolution in the same precision, measured before and after everything
else. Where the two differ by more than 10 %, or others use more than 0.2 CPUs before or after, the machine was busy, no
ratio is shown, and the exit status is 1.
`not conv` is the share of time that is neither convolution nor matrix product, from a stretch of its own under the
profiler. With --json everything is written as a result file for benchmarks.tables.
"""

import argparse
import copy
import platform
import re
import shlex
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.loops import STEPS, Loops, Setup
from benchmarks.meter import costliest, peak_flops, profiled, seconds, signs_of_others, split_time
from benchmarks.tables import portable, result_text
from data.datasets import DataConfig, SourceConfig, load_dataset
from data.split import load_permutation
from engine.runtime import PRECISIONS, Runtime, RuntimeConfig, prepare_runtime
from engine.training import TrainConfig
from formats.network import try_network
from models import ModelConfig
from utils.config import Config, Range, add_flags, from_flags, make_parser, setting
from utils.console import announce
from utils.errors import InputError
from utils.files import write_text
from utils.guard import guard
from utils.machine import find_cpus
from utils.run import versions
from utils.seeding import seeded_generator, seeded_weights

LOOK = 2.0  # seconds for which the load of others is counted
BATCHES = {"cpu": 3, "cuda": 50}
NAMES = {precision: name for name, precision in PRECISIONS.items()}


@dataclass(frozen=True)
class SpeedConfig(Config):
    """What is timed."""

    steps: tuple[str, ...] | None = setting(None, "what to time (default: all, or what --profile names)", choices=STEPS)
    batches: int | None = setting(
        None, f"batches in a timed stretch (default: {BATCHES['cpu']}, on CUDA {BATCHES['cuda']})", Range(1, 1e6)
    )
    rounds: int = setting(3, "stretches of each loop", Range(1, 1e6))
    batch_size: int = setting(
        TrainConfig.batch_size, "images in a batch of training and masks; others are as in the scripts", Range(10, 1e5)
    )
    seed: int = setting(0, "of weights and batches", Range(0))
    mask_seeds: int = setting(1, "seeds whose masks step 2 learns at once", Range(1, 1000))
    profile: str | None = setting(None, "print the ten costliest operators of this step, too", choices=STEPS)
    json: str | None = setting(None, "write everything to this file, which must not exist yet", metavar="FILE")

    @property
    def chosen(self) -> list[str]:
        """The steps to time, in the order of ``STEPS``; raises ``ValueError`` where the profiled one is not among."""
        wanted = self.steps or ((self.profile,) if self.profile else STEPS)
        if self.profile and self.profile not in wanted:
            raise ValueError(f"--profile {self.profile}: --steps leaves this step out")
        return [name for name in STEPS if name in wanted]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark."""
    parser = make_parser(__doc__)
    for config in (SpeedConfig, ModelConfig, DataConfig, SourceConfig, RuntimeConfig):
        add_flags(parser, config)
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse, and refuse flags that contradict each other (exit status 2)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        from_flags(ModelConfig, args)
        _ = from_flags(SpeedConfig, args).chosen
    except ValueError as error:
        parser.error(str(error))
    return args


def refuse_output(path: str | None) -> None:
    """Make sure that the result can be written, before minutes are spent on it.

    Raises:
        InputError: the file is there already, or its folder is not.
    """
    if path and Path(path).exists():
        raise InputError(f"{path} is there already; choose another name for --json")
    if path and not Path(path).absolute().parent.is_dir():
        raise InputError(f"{path}: there is no folder {Path(path).parent}; make it, or choose another name for --json")


def make_setup(args: argparse.Namespace, runtime: Runtime) -> Setup:
    """Load images and split, and build the network.

    Raises:
        InputError: a file is missing or damaged, or a network of the user's own does not take the images.
    """
    config, source, model = (from_flags(each, args) for each in (SpeedConfig, SourceConfig, ModelConfig))
    dataset = load_dataset(args.dataset, source.data_dir, runtime.device, args.image_size)
    permutation = load_permutation(source.split_file, len(dataset.train))
    with seeded_weights(config.seed, "initial weights"):
        network = model.build(dataset.num_classes)
    try_network(network, model, dataset.test)
    network = network.to(runtime.device, memory_format=torch.channels_last).eval()
    batches = config.batches or BATCHES[runtime.device.type]
    return Setup(dataset, network, runtime, permutation, config.batch_size, batches, config.seed, config.mask_seeds)


def measure_peaks(runtime: Runtime) -> dict[str, float]:
    """Return the peak in fp32 and in the run's precision, in GFLOP/s, by precision."""
    wanted = [name for name, precision in PRECISIONS.items() if precision in (torch.float32, runtime.precision)]
    return {name: peak_flops(runtime.device, PRECISIONS[name]) / 1e9 for name in wanted}


def time_loops(loops: Loops, rounds: int, device: torch.device) -> dict[str, Any]:
    """Return images per second of each round, their medians, and the GFLOP/s that these mean."""
    todo = {"plain": (loops.plain, loops.plain_passes), "fast": (loops.fast, loops.fast_passes)}
    todo = {name: (loop, passes) for name, (loop, passes) in todo.items() if loop}
    for loop, _ in todo.values():
        loop()  # warm-up
    rates: dict[str, list[float]] = {name: [] for name in todo}
    for _ in range(rounds):
        for name, (loop, _) in todo.items():
            rates[name].append(loops.images / seconds(loop, device))
    row: dict[str, Any] = {"batch_size": loops.batch, "images": loops.images}
    for name, (_, passes) in todo.items():
        middle = statistics.median(rates[name])
        row |= {
            name: round(middle, 2),
            f"{name}_gflops": round(middle * passes * loops.flops / 1e9, 3),
            f"{name}_rates": [round(rate, 2) for rate in rates[name]],
        }
    return row


def measure(name: str, setup: Setup, rounds: int, table: bool = False) -> dict[str, Any]:
    """Time and profile one step, and print its rates; ``table`` shows the costliest operators, too."""
    title, prepare = STEPS[name]
    torch.manual_seed(seeded_generator(setup.seed, "plain loops").initial_seed())
    loops, device = prepare(setup._replace(network=copy.deepcopy(setup.network))), setup.runtime.device
    row = {"step": name, "loop": title, **time_loops(loops, rounds, device)}
    events = profiled(loops.fast, device)
    mixing, other = split_time(events, device)
    plain, not_conv = (f"{row['plain']:.1f}" if "plain" in row else "-"), "-"
    if mixing + other:  # where CUDA's profiler is forbidden it sees no kernel
        row["not_conv_percent"] = round(100 * other / (mixing + other))
        not_conv = f"{row['not_conv_percent']} %"
    print_row(name, loops.batch, plain, f"{row['fast']:.1f}", not_conv)
    for line in costliest(events, device).splitlines() if table else ():
        announce(line)
    return row


def ratios(row: dict[str, Any], peaks: dict[str, float], precision: str) -> dict[str, float]:
    """Return shares of peak in percent and speed-up, by the names of the result files."""
    found = {"fast_percent_of_peak": round(100 * row["fast_gflops"] / peaks[precision])}
    if "plain" in row:
        found["plain_percent_of_peak"] = round(100 * row["plain_gflops"] / peaks["fp32"])
        found["speed_up"] = round(row["fast"] / row["plain"], 2)
    return found


def print_row(name: str, *cells: object) -> None:
    """Print one line of a table."""
    announce(f"{name:14}" + "".join(f"{cell!s:>15}" for cell in cells))


def processor(device: torch.device, path: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the CPU or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text() if path.exists() else "", re.M)
    return found[1].strip() if found else platform.processor() or platform.machine()


def describe(args: argparse.Namespace, setup: Setup, command: str) -> dict[str, Any]:
    """Return what a result file says of machine and settings."""
    return {
        "content": "speed",
        "command": portable(command, "speed"),
        **from_flags(ModelConfig, args).entries(),
        "dataset": setup.dataset.name,
        "batch_size": setup.batch_size,
        "batches": setup.batches,
        "rounds": args.rounds,
        "seed": setup.seed,
        "hardware": processor(setup.runtime.device),
        "device": str(setup.runtime.device),
        "threads": setup.runtime.threads,
        "precision": NAMES[setup.runtime.precision],
        "versions": versions(),
    }


def run(args: argparse.Namespace, command: str) -> None:
    """Measure, print and write; raises ``InputError`` for bad input, and at the end where the machine was busy."""
    config = from_flags(SpeedConfig, args)
    refuse_output(config.json)
    runtime = prepare_runtime(from_flags(RuntimeConfig, args))
    setup = make_setup(args, runtime)
    facts = describe(args, setup, command)
    announce(
        f"{from_flags(ModelConfig, args)}, {setup.dataset.name}, {runtime}, {facts['hardware']}, "
        f"torch {facts['versions']['torch']}; medians, --rounds {config.rounds}, --batches {setup.batches}"
    )
    used = [find_cpus(seconds=LOOK).busy]
    before = measure_peaks(runtime)
    print_row("images/s", "batch", "plain", "this project", "not conv")
    rows = [measure(name, setup, config.rounds, name == config.profile) for name in config.chosen]
    after = measure_peaks(runtime)
    used.append(find_cpus(seconds=LOOK).busy)
    signs = signs_of_others(before, after, used)
    peaks = {name: max(before[name], after[name]) for name in before}
    if not signs:
        rows = [{**row, **ratios(row, peaks, facts["precision"])} for row in rows]
    if config.json:
        measured = {"peaks_gflops": peaks, "peaks_before": before, "peaks_after": after}
        measured = {key: {name: round(peak, 1) for name, peak in value.items()} for key, value in measured.items()}
        source = "Written by python -m benchmarks.speed --json."
        result = {**facts, **measured, "busy": bool(signs), "rows": rows, "other_runs": [], "source": source}
        write_text(config.json, result_text(result))
    shown = ", ".join(f"{before[name]:.0f} and {after[name]:.0f} GFLOP/s in {name}" for name in before)
    announce(f"peak, one large convolution before and after: {shown}")
    if signs:
        raise InputError(
            f"the machine was busy: {' and '.join(signs)} meanwhile, so no ratios are shown; repeat it when nothing "
            "else is running"
        )
    print_row("", "of fp32 peak", f"of {facts['precision']} peak", "speed-up")
    for row in rows:
        plain = [f"{row['plain_percent_of_peak']} %", f"{row['speed_up']:.2f}x"] if "plain" in row else ["-", "-"]
        print_row(row["step"], plain[0], f"{row['fast_percent_of_peak']} %", plain[1])


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    args = parse_arguments(argv)
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "benchmarks.speed", *words])
    return guard(partial(run, args, command), "speed")


if __name__ == "__main__":
    sys.exit(main())
