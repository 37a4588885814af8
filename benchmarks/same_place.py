"""Do the plain fp32 loop and the fast loop end in the same place? Steps 2 and 3 from one checkpoint, both ways.

    python -m benchmarks.same_place --checkpoint ./save/last_model.th --trigger-info ./save/trigger_info.th

Both draw the same batches, augmentation and starting noise. Sweeps are compared row by row, in points of C-Acc and ASR,
each against the plain loop's masks evaluated in fp32: the fast evaluation of the same masks, the fast evaluation of the
fast loop's masks, and, as a measure for both, the plain loop with the next seed.
"""

import argparse
import copy
import sys
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from benchmarks.plain import PlainMasks
from data.augment import make_transform
from defenses import AnpConfig, Neuron, mask_values, optimize_masks
from defenses.anp import draw_batch
from defenses.pruning import SweepConfig
from engine.evaluation import Evaluator, percent
from engine.runtime import RuntimeConfig, prepare_runtime
from engine.sweep import SweepLoop
from formats.subject import Subject, add_subject_flags, load_subject
from formats.zoo import locate_inputs
from models import convert_noisy
from models.neurons import MASK_DECIMALS, sort_neurons
from utils.config import add_flags, from_flags, make_parser
from utils.guard import guard


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the comparison."""
    parser = make_parser(__doc__)
    add_subject_flags(parser)
    add_flags(parser.add_argument_group("adversarial neuron pruning"), AnpConfig, iterations=200)
    add_flags(parser.add_argument_group("computation"), RuntimeConfig)
    return parser


def learn_masks(subject: Subject, config: AnpConfig) -> tuple[list[Neuron], list[Neuron]]:
    """Return the neurons with the masks of the plain fp32 loop, and with those of the fast loop."""
    images, labels = subject.clean.images, subject.clean.labels
    noisy, plain = convert_noisy(subject.network), PlainMasks(subject.network, config)
    plain.network.to(memory_format=torch.contiguous_format)
    transform = make_transform(subject.normalization, subject.flip)

    steps = optimize_masks(noisy, images, labels, config, transform)
    for step in tqdm(steps, total=config.iterations, disable=None):
        batch, batch_labels, *noise = draw_batch(
            images, labels, len(plain.mask()), config, step.iteration - 1, transform
        )
        plain.iterate(batch.contiguous(), batch_labels, noise)
    fast = mask_values(noisy)
    rounded = (round(mask, MASK_DECIMALS) for mask in plain.mask().tolist())
    return [neuron._replace(mask=mask) for neuron, mask in zip(fast, rounded, strict=True)], fast


def sweep_of(subject: Subject, evaluator: Evaluator, neurons: list[Neuron]) -> list[tuple[float, ...]]:
    """Return threshold, C-Acc and (where there is a trigger) ASR in percent for each row of the default sweep."""
    ordered = sort_neurons(neurons)
    loop = SweepLoop(subject.network, ordered, SweepConfig().points(ordered), evaluator)
    rows = list(loop.steps())[1:]
    return [
        (row.point.threshold, *(percent(m.accuracy) for m in (row.report.clean, row.report.triggered) if m))
        for row in rows
    ]


def compare(args: argparse.Namespace) -> None:
    """Compare and print; raises ``InputError`` as ``load_subject``."""
    locate_inputs(args)
    runtime = prepare_runtime(from_flags(RuntimeConfig, args))
    subject, evaluator = load_subject(args, runtime)
    exact = copy.copy(evaluator)
    exact.precision = torch.float32
    config = from_flags(AnpConfig, args, precision=runtime.precision)
    plain, fast = learn_masks(subject, config)
    other_seed, _ = learn_masks(subject, replace(config, seed=args.seed + 1))
    reference = sweep_of(subject, exact, plain)
    for name, neurons, by in (
        ("fast evaluation", plain, evaluator),
        ("fast masks and evaluation", fast, evaluator),
        ("plain loop with the next seed", other_seed, exact),
    ):
        masks = torch.tensor([[neuron.mask for neuron in part] for part in (plain, neurons)])
        correlation, difference = torch.corrcoef(masks)[0, 1], (masks[0] - masks[1]).abs().mean()
        print(f"\n{name} ({by.precision}) against the plain loop in fp32, after {config.iterations} updates")
        print(f"masks: correlation {correlation:.4f}, mean difference {difference:.4f}")
        print("threshold, then C-Acc [ASR] of the plain loop and of the other")
        other = sweep_of(subject, by, neurons)
        for (threshold, *one), (_, *two) in zip(reference, other, strict=True):
            print(f"{threshold:4.2f}  " + "  ".join(f"{value:6.2f}" for value in (*one, *two)))
        for column, metric in enumerate(("C-Acc", "ASR")[: len(reference[0]) - 1], start=1):
            gap = max(abs(a[column] - b[column]) for a, b in zip(reference, other, strict=True))
            print(f"largest difference in {metric}: {gap:.2f} points")


def main(argv: list[str] | None = None) -> int:
    """Compare and print; returns the exit status."""
    args = build_parser().parse_args(argv)
    return guard(partial(compare, args), "same_place")


if __name__ == "__main__":
    sys.exit(main())
