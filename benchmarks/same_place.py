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

import torch
from tqdm import tqdm

from benchmarks.plain import PlainMasks
from data.augment import make_transform
from defenses import AnpConfig, AnpState, Neuron, mask_values, optimize_masks
from defenses.anp import draw_batch
from defenses.pruning import sort_neurons, sweep, threshold_points
from models import convert_noisy_batchnorm
from utils.arguments import add_compute_arguments, add_network_arguments, add_seed_argument, make_parser, number
from utils.evaluation import percent
from utils.runtime import prepare_runtime
from utils.subject import Subject, load_subject


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the comparison."""
    parser = make_parser(__doc__)
    parser.add_argument("--nb-iter", type=number(int, 1), default=200, metavar="N", help="mask updates, 1 or more")
    add_network_arguments(parser)
    add_seed_argument(parser)
    add_compute_arguments(parser)
    return parser


def learn_masks(subject: Subject, config: AnpConfig) -> tuple[list[Neuron], list[Neuron]]:
    """Return the neurons with the masks of the plain fp32 loop, and with those of the fast loop."""
    images, labels = subject.defender.images, subject.defender.labels
    noisy, plain = convert_noisy_batchnorm(subject.network), PlainMasks(subject.network, config)
    plain.network.to(memory_format=torch.contiguous_format)
    transform = make_transform(subject.normalization)

    steps = optimize_masks(noisy, images, labels, config, transform)
    for step in tqdm(steps, total=config.iterations, disable=None):
        same = AnpState(step.iteration - 1, plain.mask(), plain.mask())  # the draw depends on the iteration alone
        batch, batch_labels, *noise = draw_batch(images, labels, same, config, transform)
        plain.iterate(batch.contiguous(), batch_labels, noise)
    fast = mask_values(noisy)
    return [neuron._replace(mask=m) for neuron, m in zip(fast, plain.mask().tolist(), strict=True)], fast


def sweep_of(subject: Subject, neurons: list[Neuron], precision: torch.dtype) -> list[tuple[float, ...]]:
    """Return threshold, C-Acc and (where there is a trigger) ASR in percent for each row of the default sweep."""
    evaluator = copy.copy(subject.evaluator)
    evaluator.precision = precision
    ordered = sort_neurons(neurons)
    rows = list(sweep(subject.network, ordered, threshold_points(ordered, 0.9, 0.05), evaluator))
    return [
        (row.point.value, *(percent(m.accuracy) for m in (row.metrics.clean, row.metrics.triggered) if m))
        for row in rows[1:]
    ]


def main(argv: list[str] | None = None) -> int:
    """Compare and print; returns the exit status."""
    args = build_parser().parse_args(argv)
    runtime = prepare_runtime(args.device, args.precision, args.threads)
    subject = load_subject(args, runtime)
    config = AnpConfig(iterations=args.nb_iter, batch_size=args.batch_size, seed=args.seed, precision=runtime.precision)
    plain, fast = learn_masks(subject, config)
    other_seed, _ = learn_masks(subject, replace(config, seed=args.seed + 1))
    reference = sweep_of(subject, plain, torch.float32)
    for name, neurons, precision in (
        ("fast evaluation", plain, runtime.precision),
        ("fast masks and evaluation", fast, runtime.precision),
        ("plain loop with the next seed", other_seed, torch.float32),
    ):
        masks = torch.tensor([[neuron.mask for neuron in part] for part in (plain, neurons)])
        correlation, difference = torch.corrcoef(masks)[0, 1], (masks[0] - masks[1]).abs().mean()
        print(f"\n{name} ({precision}) against the plain loop in fp32, after {args.nb_iter} updates")
        print(f"masks: correlation {correlation:.4f}, mean difference {difference:.4f}")
        print("threshold, then C-Acc [ASR] of the plain loop and of the other")
        other = sweep_of(subject, neurons, precision)
        for (threshold, *one), (_, *two) in zip(reference, other, strict=True):
            print(f"{threshold:4.2f}  " + "  ".join(f"{value:6.2f}" for value in (*one, *two)))
        for column, metric in enumerate(("C-Acc", "ASR")[: len(reference[0]) - 1], start=1):
            gap = max(abs(a[column] - b[column]) for a, b in zip(reference, other, strict=True))
            print(f"largest difference in {metric}: {gap:.2f} points")
    return 0


if __name__ == "__main__":
    sys.exit(main())
