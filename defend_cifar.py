"""Repair a network with another defence than ANP: the same clean images, evaluation and files, for comparison.

A backdoored network of the zoo, fine-tuned as in the paper's table (about 5 minutes on a CPU core):
    python defend_cifar.py --defense ft --output-dir save/ft --checkpoint badnets-0 --trigger-info badnets-0

After ANP (ANP + FT), on what step 3 saved; neurons that are pruned stay pruned:
    python defend_cifar.py --defense ft --output-dir save/anp-ft --checkpoint save/real/repaired_model.th \\
        --trigger-info badnets-0

No defence sees the trigger or a test image, and none chooses anything by the attack success rate.

Writes to the output folder: repaired_model.th and its card, defend_log.jsonl; for mcr also curve.jsonl, .png and .pdf;
with --compact also compact_model.th; of another toolkit's checkpoint also repaired_model.LAYOUT.pt.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.console import prepare_process

    prepare_process()

import argparse
from dataclasses import asdict
from functools import partial
from typing import Any

from defenses import DEFENSES
from defenses.defense import CleanImages, Defense, RepairLoop
from defenses.tuning import TuningConfig
from engine.drive import LogConfig, drive
from engine.evaluation import Evaluator, is_ruined
from engine.memory import check_step, pruning_bytes, training_bytes
from engine.runtime import RuntimeConfig, choose_runtime
from formats.outputs import OUTPUTS
from formats.plots import plot_curve
from formats.repaired import CompactConfig, save_compact, save_repaired
from formats.subject import add_subject_flags, load_subject, remember
from formats.zoo import locate_inputs
from utils.config import (
    add_alternative_flags,
    add_flags,
    add_output_flags,
    from_flags,
    make_parser,
    record_flags,
    refuse_foreign_flags,
)
from utils.console import announce, leave
from utils.run import Run, command_line, run_script
from utils.table import Table

CURVE = {"t": "4.1f", "defender acc %": "7.2f", "C-Acc %": "7.2f", "ASR %": "7.2f"}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the other defences."""
    parser = make_parser(__doc__)
    add_subject_flags(parser)
    group = parser.add_argument_group("defence")
    names = ", ".join(f"{name}: {defense.title}" for name, defense in DEFENSES.items())
    group.add_argument("--defense", required=True, choices=list(DEFENSES), help=f"the defence ({names})")
    add_alternative_flags(group, DEFENSES)
    add_flags(group, LogConfig)
    add_flags(group, CompactConfig)
    add_flags(parser.add_argument_group("computation"), RuntimeConfig)
    add_output_flags(parser)
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse, and refuse flags that the defence does not take (exit status 2)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        refuse_foreign_flags(args, DEFENSES.values(), DEFENSES[args.defense], f"--defense {args.defense}")
        record_flags(from_flags(DEFENSES[args.defense], args), args)
    except ValueError as error:
        parser.error(str(error))
    return args


def measure_curve(run: Run, loop: RepairLoop, measure: Evaluator) -> None:
    """Measure the networks of a curve, and draw it."""
    table = Table(run.folder / "curve.jsonl", {"command": run.command}, CURVE)
    for t, make in loop.candidates().items():
        table.add({**dict.fromkeys(CURVE), "t": t, **measure(make()).row()})
    table.write(ended=True)
    plot_curve(run.folder / "curve.png", table.rows, loop.config.t)


def describe(config: Defense, loop: RepairLoop) -> dict[str, Any]:
    """Return what a card says about the repair."""
    settings = {name: value for name, value in asdict(config).items() if name != "precision"}
    return {"method": config.title, "settings": settings, **loop.found()}


def defend(args: argparse.Namespace, run: Run) -> None:
    """Carry out a defence in the run's folder."""
    runtime = choose_runtime(from_flags(RuntimeConfig, args), run)
    subject, evaluator = load_subject(args, runtime)
    remember(run, subject)
    config = from_flags(DEFENSES[args.defense], args, precision=runtime.precision)
    tunes = isinstance(config, TuningConfig)
    estimate, batch = (training_bytes, config.batch_size) if tunes else (pruning_bytes, evaluator.batch_size)
    check_step(estimate, subject.network, batch, runtime, subject.clean)
    loop = config.make_loop(subject.network, CleanImages.of(subject), args.print_every)
    *_, (_, report) = drive(run, loop, lambda: evaluator(loop.current()))  # the last row is that of the result
    network, repair = loop.current(), describe(config, loop)
    if loop.candidates():
        measure_curve(run, loop, evaluator)
    card = save_repaired(run, subject, network, repair, report)
    announce(f"repaired: {report}")
    if is_ruined(run.log.rows[0]["defender acc %"] / 100, report.defender.accuracy, subject.clean):
        announce(f"warning: the repaired network only guesses; {config.milder}")
    if args.compact:
        save_compact(run.folder, network, card, subject, evaluator)
    announce(f"saved {run.folder / 'repaired_model.th'}; {run.seconds:.0f} s")


def main(argv: list[str] | None = None) -> int:
    """Carry out a defence; returns the exit status."""
    args = parse_arguments(argv)
    command = command_line("defend_cifar.py", argv)
    return run_script(partial(defend, args), "defend", args, command, OUTPUTS["defend"], partial(locate_inputs, args))


if __name__ == "__main__":
    leave(main())
