"""Step 2: learn a mask for each neuron from a few clean images, while the neurons are adversarially perturbed.

After step 1:
    python optimize_mask_cifar.py --output-dir ./save --checkpoint ./save/last_model.th \\
        --trigger-info ./save/trigger_info.th

A published checkpoint, which has no card; its own split keeps the clean images unseen:
    python optimize_mask_cifar.py --output-dir ./save --checkpoint last_model.th --arch resnet18 \\
        --trigger-info trigger_info.th --split-file permutation.txt

Writes to the output folder: mask_values.txt, mask_values.png, optimize_log.jsonl.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import nn

from data.augment import make_transform
from defenses import AnpConfig, AnpState, AnpStep, mask_values, optimize_masks
from defenses.anp import apply_masks, set_masks
from models import convert_noisy_batchnorm
from utils.arguments import (
    add_anp_arguments,
    add_compute_arguments,
    add_network_arguments,
    add_output_arguments,
    add_seed_argument,
    make_parser,
)
from utils.evaluation import percent
from utils.mask_file import write_masks
from utils.plots import plot_masks
from utils.run import Run, announce, command_line, run_script
from utils.subject import Subject, load_subject

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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of step 2."""
    parser = make_parser(__doc__)
    add_network_arguments(parser)
    add_anp_arguments(parser)
    add_seed_argument(parser)
    add_compute_arguments(parser)
    add_output_arguments(parser, resumable=True)
    return parser


class Means:
    """Running means of what the iterations saw, summed on the device."""

    def __init__(self, sums: torch.Tensor, count: int):
        self.sums, self.count = sums, count

    def watch(self, steps: Iterable[AnpStep]) -> Iterator[AnpStep]:
        """Pass steps through and add them up."""
        for step in steps:
            self.sums += torch.stack([step.loss, step.natural_loss, step.perturbed_loss, step.accuracy])
            self.count += 1
            yield step

    def take(self) -> list[float | None]:
        """Return loss, natural loss, perturbed loss and accuracy since the last call; None if there was no step."""
        means = (self.sums / self.count).tolist() if self.count else [None] * 4
        self.sums.zero_()
        self.count = 0
        return means


def add_row(run: Run, subject: Subject, noisy: nn.Module, state: AnpState, means: Means) -> None:
    """Measure the masked network and log one row."""
    report = subject.evaluator(apply_masks(subject.network, noisy))
    with run.uninterrupted():
        loss, natural_loss, perturbed_loss, accuracy = means.take()
        run.log.add(
            {
                "iteration": state.iteration,
                "loss": loss,
                "natural loss": natural_loss,
                "perturbed loss": perturbed_loss,
                "batch acc %": accuracy and percent(accuracy),
                "C-Acc %": percent(report.clean.accuracy),
                "ASR %": report.triggered and percent(report.triggered.accuracy),
                "masks <= 0.2": int((state.mask <= 0.2).sum()),
                "seconds": run.seconds,
            }
        )


def optimize(args: argparse.Namespace, run: Run) -> None:
    """Carry out step 2 in the run's folder."""
    runtime = run.prepare_runtime()
    subject = load_subject(args, runtime)
    config = AnpConfig(
        args.anp_eps,
        args.anp_steps,
        args.anp_alpha,
        args.lr,
        iterations=args.nb_iter,
        batch_size=args.batch_size,
        project=args.anp_project,
        seed=args.seed,
        precision=runtime.precision,
    )
    noisy = convert_noisy_batchnorm(subject.network)
    state = AnpState.start(noisy)
    means = Means(torch.zeros(4, device=runtime.device), 0)
    if run.saved:
        iteration, *vectors = run.saved["state"]
        state = AnpState(iteration, *(vector.to(runtime.device) for vector in vectors))
        set_masks(noisy, state.mask)
        sums, count = run.saved["means"]
        means = Means(sums.to(runtime.device), count)
    log = run.table(COLUMNS)
    run.snapshot = lambda: {
        "state": [state.iteration, state.mask, state.momentum],
        "means": [means.sums, means.count],
    }

    def add_row_if_due():
        due = state.iteration % args.print_every == 0 or state.iteration == args.nb_iter
        if due and (not log.rows or log.rows[-1]["iteration"] < state.iteration):
            add_row(run, subject, noisy, state, means)

    defender, transform = subject.defender, make_transform(subject.normalization)
    steps = means.watch(optimize_masks(noisy, defender.images, defender.labels, config, transform, state))
    add_row_if_due()
    for _ in run.track(steps, args.nb_iter, state.iteration, "masks", "iteration"):
        add_row_if_due()
    neurons = mask_values(noisy)
    write_masks(run.folder / "mask_values.txt", neurons, subject.card["repaired_from"]["sha256"])
    plot_masks(run.folder / "mask_values.png", neurons)
    announce(f"saved {run.folder / 'mask_values.txt'}: {len(neurons)} neurons; {run.seconds:.0f} s")


def main(argv: list[str] | None = None) -> int:
    """Run step 2; returns the exit status."""
    args = build_parser().parse_args(argv)
    return run_script(partial(optimize, args), "optimize", args, command_line("optimize_mask_cifar.py", argv))


if __name__ == "__main__":
    sys.exit(main())
