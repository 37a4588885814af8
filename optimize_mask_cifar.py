"""Step 2: learn a mask for each neuron from a few clean images, while the neurons are adversarially perturbed.

After step 1:
    python optimize_mask_cifar.py --output-dir ./save --checkpoint ./save/last_model.th \\
        --trigger-info ./save/trigger_info.th

A published checkpoint, which has no card; its own split keeps the clean images unseen:
    python optimize_mask_cifar.py --output-dir ./save --checkpoint last_model.th --arch resnet18 \\
        --trigger-info trigger_info.th --split-file permutation.txt

Writes to the output folder: mask_values.txt, the same as .png and .pdf, optimize_log.jsonl.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.console import prepare_process

    prepare_process()

import argparse
from functools import partial

from defenses.anp import AnpConfig, MaskLoop
from defenses.pruning import PAPER_THRESHOLD
from engine.drive import LogConfig, drive
from engine.evaluation import is_ruined
from engine.memory import check_step, masking_bytes
from engine.runtime import RuntimeConfig, choose_runtime
from formats.mask_file import write_masks
from formats.outputs import OUTPUTS
from formats.plots import plot_masks
from formats.subject import Subject, add_subject_flags, load_subject, remember
from formats.zoo import locate_inputs
from utils.config import add_flags, add_output_flags, from_flags, make_parser
from utils.console import announce, leave
from utils.errors import InputError
from utils.run import Run, command_line, run_script


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of step 2."""
    parser = make_parser(__doc__)
    add_subject_flags(parser)
    group = parser.add_argument_group("adversarial neuron pruning")
    add_flags(group, AnpConfig)
    add_flags(group, LogConfig)
    add_flags(parser.add_argument_group("computation"), RuntimeConfig)
    add_output_flags(parser)
    return parser


def refuse_useless(rows: list[dict], subject: Subject) -> None:
    """Make sure that masks say something about the neurons: the masked network must not have come down to guessing.

    Raises:
        InputError: it has, though the network as it came knew its classes.
    """
    before, after = (row["defender acc %"] / 100 for row in (rows[0], rows[-1]))
    if is_ruined(before, after, subject.clean):
        raise InputError(
            f"with these masks the network only guesses ({100 * after:.1f} % of the clean images, {100 * before:.1f} % "
            "before), so they are of no use; lower --lr or --anp-eps"
        )


def optimize(args: argparse.Namespace, run: Run) -> None:
    """Carry out step 2 in the run's folder."""
    runtime = choose_runtime(from_flags(RuntimeConfig, args), run)
    subject, evaluator = load_subject(args, runtime)
    remember(run, subject)
    config = from_flags(AnpConfig, args, precision=runtime.precision)
    check_step(masking_bytes, subject.network, config.batch_size, runtime, subject.clean)
    loop = MaskLoop(subject, config, args.print_every)
    for _ in drive(run, loop, lambda: evaluator(loop.masked())):
        pass
    refuse_useless(run.log.rows, subject)
    neurons = loop.neurons()
    write_masks(run.folder / "mask_values.txt", neurons, subject.card["repaired_from"]["sha256"])
    plot_masks(run.folder / "mask_values.png", neurons, PAPER_THRESHOLD)
    announce(f"saved {run.folder / 'mask_values.txt'}: {len(neurons)} neurons; {run.seconds:.0f} s")


def main(argv: list[str] | None = None) -> int:
    """Run step 2; returns the exit status."""
    args = build_parser().parse_args(argv)
    command = command_line("optimize_mask_cifar.py", argv)
    return run_script(
        partial(optimize, args), "optimize", args, command, OUTPUTS["optimize"], partial(locate_inputs, args)
    )


if __name__ == "__main__":
    leave(main())
