"""Step 3: prune the neurons whose mask came out small, and save the repaired network.

After steps 1 and 2:
    python prune_neuron_cifar.py --output-dir ./save --mask-file ./save/mask_values.txt \\
        --checkpoint ./save/last_model.th --trigger-info ./save/trigger_info.th

The operating point is chosen from the defender's clean images alone: a --threshold (the paper's 0.2 by default) or a
--number of neurons, the last point of the sweep that costs at most --max-acc-drop percentage points of their accuracy,
or what a detector and patches in the place of the trigger say (--trigger-free).

Writes to the output folder: repaired_model.th and its card; pruning_by_threshold (or _number).txt, .png, .pdf and
_log.jsonl; with --trigger-free what it found, trigger_free.json, .png and .pdf; with --compact a smaller network of the
same outputs, compact_model.th; of another toolkit's checkpoint also repaired_model.LAYOUT.pt, for that toolkit.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.console import prepare_process

    prepare_process()

import argparse
from functools import partial

from defenses.pruning import Choice, ChoiceConfig, SweepConfig, choose
from defenses.trigger_free import TriggerFree, TriggerFreeConfig, choose_for
from engine.drive import drive
from engine.evaluation import BatchConfig, is_ruined, percent
from engine.memory import check_step, pruning_bytes
from engine.runtime import RuntimeConfig, choose_runtime
from engine.sweep import SweepLoop
from formats.mask_file import MaskFileConfig, check_source, held_out_share, read_masks
from formats.outputs import OUTPUTS
from formats.plots import plot_sweep, plot_trigger_free
from formats.pruning_file import write_sweep
from formats.repaired import CompactConfig, save_compact, save_repaired
from formats.subject import add_subject_flags, load_subject, remember
from formats.zoo import locate_inputs
from models.neurons import Neuron, pruned_copy, sort_neurons
from utils.config import add_alternative_flags, add_flags, add_output_flags, from_flags, given_flags, make_parser
from utils.console import announce, leave
from utils.errors import InputError
from utils.files import as_json, write_bytes
from utils.run import Run, command_line, run_script


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of step 3."""
    parser = make_parser(__doc__)
    add_subject_flags(parser)
    group = parser.add_argument_group("pruning")
    add_flags(group, MaskFileConfig)
    add_flags(group, BatchConfig)
    add_flags(group, SweepConfig)
    add_flags(group.add_mutually_exclusive_group(), ChoiceConfig)
    add_alternative_flags(parser.add_argument_group("without the trigger"), {"--trigger-free": TriggerFreeConfig})
    add_flags(group, CompactConfig)
    add_flags(parser.add_argument_group("computation"), RuntimeConfig)
    add_output_flags(parser)
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse, and refuse flags that do not go together (exit status 2)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        from_flags(SweepConfig, args)
        if not args.trigger_free and (given := given_flags(args, TriggerFreeConfig)):
            raise ValueError(
                f"--{next(iter(given)).replace('_', '-')} has no effect without --trigger-free; leave it out"
            )
    except ValueError as error:
        parser.error(str(error))
    return args


def write_down(run: Run, found: TriggerFree, neurons: list[Neuron]) -> Choice:
    """Write and draw what was found without the trigger; returns the operating point."""
    write_bytes(run.folder / "trigger_free.json", as_json(found.as_dict()))
    choice = found.choice(neurons)
    if found.stop and found.detection.suspect is not None:
        shares = percent(found.config.patch_left), percent(choice.point.count / len(neurons))
        plot_trigger_free(run.folder / "trigger_free.png", found.curves(len(neurons)), *shares)
    return choice


def prune(args: argparse.Namespace, run: Run) -> None:
    """Carry out step 3 in the run's folder."""
    runtime = choose_runtime(from_flags(RuntimeConfig, args), run)
    held_out = held_out_share(args.mask_file, args.val_frac, args.val_split)
    run.rely_on({"held_out": held_out})
    subject, evaluator = load_subject(args, runtime, args.batch_size, held_out)
    remember(run, subject)
    check_source(args.mask_file, subject.card["repaired_from"]["sha256"])
    neurons = sort_neurons(read_masks(args.mask_file, subject.network))
    if (args.number or 0) > len(neurons):
        raise InputError(f"--number {args.number}: the network has {len(neurons)} neurons")
    check_step(pruning_bytes, subject.network, min(evaluator.batch_size, evaluator.largest), runtime, subject.clean)
    if not (points := from_flags(SweepConfig, args).points(neurons)):
        raise InputError(f"--pruning-step {args.pruning_step:g}: the network has {len(neurons)} neurons")
    found = None
    if args.trigger_free:  # before the sweep, which would be lost if this failed
        found = choose_for(subject, neurons, from_flags(TriggerFreeConfig, args), runtime.precision, announce)
    loop = SweepLoop(subject.network, neurons, points, evaluator)
    for _ in drive(run, loop, lambda: loop.rows[-1].report):
        pass
    rows = [(row.point.count, row.point.last, row.point.mask, row.report) for row in loop.rows]
    write_sweep(run.folder / f"pruning_by_{args.pruning_by}.txt", rows)
    accuracies = [row.report.defender.accuracy for row in loop.rows]
    config = from_flags(ChoiceConfig, args)
    choice = write_down(run, found, neurons) if found else choose(neurons, loop.points, accuracies, config)
    report = loop.report_of(choice.point)
    repair = {"method": "ANP", "chosen": choice.words, "pruned_neurons": choice.point.count, "why": choice.reason}
    repaired = pruned_copy(subject.network, loop.neurons[: choice.point.count])
    card = save_repaired(run, subject, repaired, repair, report)
    row = {**loop.describe(choice.point), **report.row()}
    plot_sweep(run.folder / f"pruning_by_{args.pruning_by}.png", run.log.rows, args.pruning_by, row)
    share = f"{choice.point.count} of {len(neurons)} neurons, {row['pruned %']:.2f} %"
    announce(f"chosen: {choice.words} ({choice.reason}): {share}")
    announce(f"before: {loop.rows[0].report}")
    announce(f"after:  {report}")
    if is_ruined(accuracies[0], report.defender.accuracy, subject.judging):
        announce("warning: the repaired network only guesses; prune fewer neurons (--max-acc-drop, --threshold)")
    if args.compact:
        save_compact(run.folder, repaired, card, subject, evaluator)
    announce(f"saved {run.folder / 'repaired_model.th'}; {run.seconds:.0f} s")


def main(argv: list[str] | None = None) -> int:
    """Run step 3; returns the exit status."""
    args = parse_arguments(argv)
    step = f"pruning_by_{args.pruning_by}"
    command = command_line("prune_neuron_cifar.py", argv)
    return run_script(partial(prune, args), step, args, command, OUTPUTS[step], partial(locate_inputs, args))


if __name__ == "__main__":
    leave(main())
