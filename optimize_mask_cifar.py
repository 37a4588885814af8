"""Step 2: learn a mask for each neuron from a few clean images, while the neurons are adversarially perturbed.

After step 1:
    python optimize_mask_cifar.py --output-dir ./save --checkpoint ./save/last_model.th \\
        --trigger-info ./save/trigger_info.th

A published checkpoint, which has no card; its own split keeps the clean images unseen:
    python optimize_mask_cifar.py --output-dir ./save --checkpoint last_model.th --arch resnet18 \\
        --trigger-info trigger_info.th --split-file permutation.txt

The masks of several seeds at once, each in a folder of its own, seed-0 and so on:
    python optimize_mask_cifar.py --output-dir ./save --checkpoint ./save/last_model.th --seeds 0 1 2

Writes to the output folder: mask_values.txt, the same as .png and .pdf, optimize_log.jsonl.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.console import prepare_process

    prepare_process()

import argparse
from dataclasses import dataclass, replace
from functools import partial

from defenses.anp import AnpConfig, MaskLoop
from defenses.pruning import PAPER_THRESHOLD
from engine.drive import LogConfig, drive
from engine.evaluation import Reports, is_ruined
from engine.memory import check_step, masking_bytes
from engine.runtime import RuntimeConfig, choose_runtime
from formats.mask_file import MOST_HELD_OUT, write_masks
from formats.outputs import outputs_of_masks, seed_folder
from formats.plots import plot_masks
from formats.subject import Subject, add_subject_flags, load_subject, remember
from formats.zoo import locate_inputs
from utils.config import Config, Range, add_flags, add_output_flags, from_flags, make_parser, setting
from utils.console import announce, leave
from utils.errors import InputError
from utils.run import Run, command_line, run_script


@dataclass(frozen=True)
class HoldOutConfig(Config):
    """Which of the clean images the masks are not learnt from."""

    val_split: float = setting(
        0.0, "share of the clean images that is held out, for step 3 to judge by", Range(0, MOST_HELD_OUT)
    )


@dataclass(frozen=True)
class SeedsConfig(Config):
    """Which seeds to learn masks for at once."""

    seeds: tuple[int, ...] | None = setting(
        None, "instead of --seed: learn the masks of several seeds together, each in a folder seed-N", Range(0)
    )

    def __post_init__(self):
        super().__post_init__()
        if self.seeds and len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds {' '.join(map(str, self.seeds))}: name every seed once")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of step 2."""
    parser = make_parser(__doc__)
    add_subject_flags(parser)
    group = parser.add_argument_group("adversarial neuron pruning")
    add_flags(group, AnpConfig)
    add_flags(group, SeedsConfig)
    add_flags(group, HoldOutConfig)
    add_flags(group, LogConfig)
    add_flags(parser.add_argument_group("computation"), RuntimeConfig)
    add_output_flags(parser)
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse, and refuse seeds that contradict each other (exit status 2)."""
    parser = build_parser()
    args = parser.parse_args(argv, argparse.Namespace(seed=None))  # not its default: was it given?
    try:
        from_flags(SeedsConfig, args)
    except ValueError as error:
        parser.error(str(error))
    if args.seeds and args.seed is not None:
        parser.error("argument --seed: not allowed with argument --seeds")
    if args.seed is None and not args.seeds:
        args.seed = AnpConfig.seed
    return args


def refuse_useless(rows: list[dict], subject: Subject) -> None:
    """Make sure that masks say something about the neurons: the masked network must not have come down to guessing.

    Raises:
        InputError: it has, though the network as it came knew its classes.
    """
    first, last = (row.get("by seed") or {"": row} for row in (rows[0], rows[-1]))
    for seed, row in last.items():
        before, after = (each["defender acc %"] / 100 for each in (first[seed], row))
        if is_ruined(before, after, subject.judging):
            raise InputError(
                f"{seed and f'seed {seed}: '}with these masks the network only guesses ({100 * after:.1f} % of the "
                f"clean images, {100 * before:.1f} % before), so they are of no use; lower --lr or --anp-eps"
            )


def optimize(args: argparse.Namespace, run: Run) -> None:
    """Carry out step 2 in the run's folder."""
    runtime = choose_runtime(from_flags(RuntimeConfig, args), run)
    subject, evaluator = load_subject(args, runtime, held_out=args.val_split)
    remember(run, subject)
    config = from_flags(AnpConfig, args, precision=runtime.precision)
    folders = {seed: run.folder / seed_folder(seed) for seed in args.seeds or ()} or {config.seed: run.folder}
    check_step(masking_bytes, subject.network, len(folders) * config.batch_size, runtime, subject.clean)
    loop = MaskLoop(subject, [replace(config, seed=seed) for seed in folders], args.print_every)
    for folder in folders.values():  # before the work, in case it cannot be made
        folder.mkdir(exist_ok=True)
    if len(folders) > 1:
        announce(f"{len(folders)} seeds at once: the table shows means over them, the log the figures of each, too")
    for _ in drive(run, loop, lambda: Reports({str(s): evaluator(loop.masked(r)) for r, s in enumerate(folders)})):
        pass
    refuse_useless(run.log.rows, subject)
    for number, folder in enumerate(folders.values()):
        neurons = loop.neurons(number)
        held_out = {"val_frac": args.val_frac, "val_split": args.val_split} if args.val_split else None
        write_masks(folder / "mask_values.txt", neurons, subject.card["repaired_from"]["sha256"], held_out)
        plot_masks(folder / "mask_values.png", neurons, PAPER_THRESHOLD)
        announce(f"saved {folder / 'mask_values.txt'}: {len(neurons)} neurons; {run.seconds:.0f} s")


def main(argv: list[str] | None = None) -> int:
    """Run step 2; returns the exit status."""
    args = parse_arguments(argv)
    command = command_line("optimize_mask_cifar.py", argv)
    outputs = outputs_of_masks(args.seeds or ())
    return run_script(partial(optimize, args), "optimize", args, command, outputs, partial(locate_inputs, args))


if __name__ == "__main__":
    leave(main())
