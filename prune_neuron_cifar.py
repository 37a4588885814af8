"""Step 3: prune the neurons whose mask came out small, and save the repaired network.

After steps 1 and 2:
    python prune_neuron_cifar.py --output-dir ./save --mask-file ./save/mask_values.txt \\
        --checkpoint ./save/last_model.th --trigger-info ./save/trigger_info.th

The operating point is chosen from the defender's clean images alone: a fixed threshold (--threshold, by default the
paper's 0.2), or the last point of the sweep that costs at most --max-acc-drop percentage points of their accuracy.

Writes to the output folder: repaired_model.th and its card, pruning_by_threshold.txt (or pruning_by_number.txt), the
same as .png and _log.jsonl.
"""

import argparse
import sys
from functools import partial

from torch import nn

from defenses.pruning import (
    Neuron,
    PruningPoint,
    SweepRow,
    largest_within_drop,
    number_points,
    pruned_copy,
    sort_neurons,
    sweep,
    threshold_point,
    threshold_points,
)
from utils.arguments import (
    DEFAULT_SWEEP,
    DEFAULT_THRESHOLD,
    SWEEP_SHARES,
    add_compute_arguments,
    add_network_arguments,
    add_output_arguments,
    add_pruning_arguments,
    make_parser,
)
from utils.cards import save_with_card
from utils.evaluation import Report, percent
from utils.mask_file import check_source, read_masks
from utils.plots import plot_sweep
from utils.pruning_file import write_sweep
from utils.run import Run, announce, command_line, run_script, versions
from utils.subject import Subject, load_subject

COLUMNS = {
    "pruned": "6d",
    "pruned %": "6.2f",
    "mask": "6.4f",
    "defender acc %": "7.2f",
    "clean loss": "8.4f",
    "C-Acc %": "7.2f",
    "ASR %": "7.2f",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of step 3."""
    parser = make_parser(__doc__)
    add_network_arguments(parser)
    add_pruning_arguments(parser)
    add_compute_arguments(parser)
    add_output_arguments(parser, resumable=False)
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse, and refuse sweep limits that do not go with what is counted (exit status 2)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.pruning_by == "threshold" and args.pruning_max is not None and args.pruning_max > 1:
        parser.error(
            f"--pruning-max {args.pruning_max:g}: masks lie in 0..1 (a number of neurons needs --pruning-by number)"
        )
    if args.pruning_by == "threshold" and args.pruning_step is not None and args.pruning_step < 1e-4:
        parser.error(f"--pruning-step {args.pruning_step:g}: masks have 4 decimals, a smaller step shows nothing new")
    for name in ("pruning_max", "pruning_step"):
        value = getattr(args, name)
        if args.pruning_by == "number" and value is not None and not (value >= 1 and value == int(value)):
            parser.error(
                f"--{name.replace('_', '-')} {value:g}: --pruning-by number counts in whole neurons, 1 or more"
            )
    return args


def plan(args: argparse.Namespace, neurons: list[Neuron]) -> list[PruningPoint]:
    """Return the points of the sweep."""
    if args.pruning_by == "threshold":
        maximum = DEFAULT_SWEEP[0] if args.pruning_max is None else args.pruning_max
        return threshold_points(neurons, maximum, args.pruning_step or DEFAULT_SWEEP[1])
    maximum = len(neurons) if args.pruning_max is None else args.pruning_max
    return number_points(neurons, maximum, args.pruning_step or max(1, len(neurons) // SWEEP_SHARES))


def as_dict(row: SweepRow[Report], total: int) -> dict:
    """Return a row of the sweep as the log and the pictures take it."""
    point, report = row.point, row.metrics
    return {
        "pruned": point.count,
        "pruned %": percent(point.count / total),
        "layer": point.last and point.last.layer,
        "neuron": point.last and point.last.index,
        "mask": point.value,
        "defender acc %": percent(report.defender.accuracy),
        "clean loss": report.clean.loss,
        "C-Acc %": percent(report.clean.accuracy),
        "triggered loss": report.triggered and report.triggered.loss,
        "ASR %": report.triggered and percent(report.triggered.accuracy),
    }


def choose(
    args: argparse.Namespace, subject: Subject, neurons: list[Neuron], rows: list[SweepRow[Report]]
) -> tuple[SweepRow[Report], str]:
    """Choose the operating point from clean data alone; returns its row and the reason."""
    if args.max_acc_drop is not None:
        row = largest_within_drop(rows, lambda report: report.defender.accuracy, args.max_acc_drop / 100)
        return row, (
            f"the last point of the sweep that costs at most {args.max_acc_drop:g} points of accuracy on the "
            f"{len(subject.defender)} clean images"
        )
    threshold = DEFAULT_THRESHOLD if args.threshold is None else args.threshold
    point = threshold_point(neurons, threshold)
    known = [row.metrics for row in rows if row.point.count == point.count]
    metrics = known[0] if known else subject.evaluator(pruned_copy(subject.network, neurons[: point.count]))
    return SweepRow(point, metrics), "the paper's fixed threshold" if args.threshold is None else "--threshold"


def describe(args: argparse.Namespace, point: PruningPoint) -> str:
    """Say in words what a point prunes."""
    if point.value is None:
        return "prune nothing"
    if args.pruning_by == "number" and args.max_acc_drop is not None:
        return f"prune the {point.count} neurons of smallest mask, up to {point.value:g}"
    return f"prune every neuron with mask <= {point.value:g}"


def save_repaired(
    run: Run, subject: Subject, network: nn.Module, row: SweepRow[Report], chosen: str, reason: str
) -> None:
    """Save the repaired network, loadable like the one it came from, and its card."""
    repair = {"method": "ANP", "chosen": chosen, "pruned_neurons": row.point.count, "why": reason}
    card = {**subject.card, "repair": repair, "metrics": row.metrics.rounded(), "command": run.command}
    save_with_card(run.folder / "repaired_model.th", network.state_dict(), {**card, "versions": versions()})


def prune(args: argparse.Namespace, run: Run) -> None:
    """Carry out step 3 in the run's folder."""
    runtime = run.prepare_runtime()
    subject = load_subject(args, runtime, evaluation_batch=args.batch_size)
    check_source(args.mask_file, subject.card["repaired_from"]["sha256"])
    neurons = sort_neurons(read_masks(args.mask_file, subject.network))
    points = plan(args, neurons)
    log = run.table(COLUMNS)
    rows = []
    steps = sweep(subject.network, neurons, points, subject.evaluator)
    for row in run.track(steps, len(points) + 1, 0, "sweep", "row"):
        rows.append(row)
        log.add(as_dict(row, len(neurons)))
    write_sweep(run.folder / f"pruning_by_{args.pruning_by}.txt", rows)
    chosen, reason = choose(args, subject, neurons, rows)
    count = chosen.point.count
    what = describe(args, chosen.point)
    save_repaired(run, subject, pruned_copy(subject.network, neurons[:count]), chosen, what, reason)
    plot_sweep(
        run.folder / f"pruning_by_{args.pruning_by}.png", log.rows, args.pruning_by, as_dict(chosen, len(neurons))
    )
    announce(f"chosen: {what} ({reason}): {count} of {len(neurons)} neurons, {100 * count / len(neurons):.2f} %")
    announce(f"before: {rows[0].metrics}")
    announce(f"after:  {chosen.metrics}")
    announce(f"saved {run.folder / 'repaired_model.th'}; {run.seconds:.0f} s")


def main(argv: list[str] | None = None) -> int:
    """Run step 3; returns the exit status."""
    args = parse_arguments(argv)
    step = f"pruning_by_{args.pruning_by}"
    return run_script(partial(prune, args), step, args, command_line("prune_neuron_cifar.py", argv))


if __name__ == "__main__":
    sys.exit(main())
