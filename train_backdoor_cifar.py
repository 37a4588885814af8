"""Step 1: train a backdoored network on poisoned CIFAR-10.

A CPU minute, nothing to download:
    python train_backdoor_cifar.py --dataset synthetic --widen-factor 0.125 --epoch 12 --batch-size 64 \\
        --lr-schedule one-cycle --poison-rate 0.1

The paper (ResNet-18, BadNets 5 %, target 0; hours on a GPU), and the same on 4 GPUs:
    python train_backdoor_cifar.py --output-dir ./save
    torchrun --standalone --nproc-per-node 4 train_backdoor_cifar.py --output-dir ./save

Writes to the output folder: last_model.th and its card last_model.json, model_init.th, model_{epoch}.th,
trigger_info.th, train_log.jsonl, train_curves and clean_and_triggered as .png and .pdf; generators.th for input-aware
attacks and clean_label_set/ for clean-label.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.console import prepare_process

    prepare_process()

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from attacks import Attack, Workspace
from attacks.flags import add_attack_flags, describe, read_attack
from attacks.image_folder import export_poisoned, refuse_other_files
from attacks.outputs import network_card, write_trigger
from data.datasets import DataConfig, SourceConfig, load_dataset
from data.split import attacker_index, load_permutation, permutation_digest
from engine.drive import drive
from engine.memory import check_step, training_bytes
from engine.parallel import follow, join, processes, spread
from engine.runtime import Runtime, RuntimeConfig, choose_runtime
from engine.training import KeepConfig, TrainConfig, measure_of
from formats.cards import save_with_card
from formats.network import sketch_of, try_network
from formats.outputs import OUTPUTS
from formats.plots import plot_training
from formats.zoo import ZooConfig, locate_inputs
from models import ModelConfig
from utils.config import add_flags, add_output_flags, from_flags, make_parser
from utils.console import announce, leave
from utils.run import Run, command_line, run_script
from utils.seeding import seeded_weights

TAKEN_HOLD = 0.5  # attack success rate below which step 1 warns


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of step 1."""
    parser = make_parser(__doc__)
    add_attack_flags(parser)
    for title, config in (
        ("model", ModelConfig),
        ("data", DataConfig),
        ("source", SourceConfig),
        ("zoo", ZooConfig),
        ("computation", RuntimeConfig),
        ("checkpoints", KeepConfig),
    ):
        add_flags(parser.add_argument_group(title), config)
    add_output_flags(parser)
    return parser


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, Attack, TrainConfig]:
    """Parse, and refuse flags that contradict each other (exit status 2)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        from_flags(ModelConfig, args)  # its flags must not contradict each other
        return args, *read_attack(args)
    except ValueError as error:
        parser.error(str(error))


def open_workspace(args: argparse.Namespace, run: Run, runtime: Runtime) -> Workspace:
    """Load what the attacker works with."""
    source = from_flags(SourceConfig, args)
    dataset = load_dataset(args.dataset, source.data_dir, runtime.device, args.image_size)
    run.rely_on({"dataset": dataset.identity})
    permutation = load_permutation(source.split_file, len(dataset.train))
    digest, model = permutation_digest(permutation), from_flags(ModelConfig, args)
    held = attacker_index(permutation)
    return Workspace(dataset, held, digest, args.seed, run.folder, run.overwriting, runtime, model, run.track)


def train(args: argparse.Namespace, attack: Attack, config: TrainConfig, run: Run) -> None:
    """Carry out step 1 in the run's folder."""
    if args.export_poisoned:
        refuse_other_files(Path(args.export_poisoned))
    run.rely_on({"processes": processes()})
    runtime = choose_runtime(from_flags(RuntimeConfig, args), run)
    workspace = open_workspace(args, run, runtime)
    dataset, model = workspace.dataset, workspace.model
    sketch = sketch_of(model, dataset.num_classes)
    try_network(sketch, model, dataset.test)
    check_step(training_bytes, sketch, min(config.batch_size, len(workspace.held)), runtime, dataset.train, copies=2)
    poisoned = attack.carry_out(workspace)
    count, total = len(poisoned.index), len(poisoned.train)
    if count:
        announce(f"{args.poison_type}: {count} of {total} training images poisoned ({100 * count / total:.2f} %)")
    if args.export_poisoned:
        export_poisoned(workspace, poisoned, Path(args.export_poisoned))
    with seeded_weights(args.seed, "initial weights"):
        network = model.build(dataset.num_classes)
    network = network.to(runtime.device, memory_format=torch.channels_last)
    loop = attack.make_loop(network, poisoned, dataset, replace(config, precision=runtime.precision))
    loop = spread(loop, model)
    known = describe(attack, args.poison_type, poisoned)
    card = network_card(workspace, args.split_file, known, run.command)
    measure = measure_of(loop, poisoned.trigger, dataset, runtime.precision)  # refuses a trigger that does not fit
    data_index = workspace.data_index(poisoned)
    if not run.saved:
        run.clear()
        save_with_card(run.folder / "model_init.th", network.state_dict(), {**card, "epochs": 0})
    write_trigger(run.folder, poisoned.trigger, dataset, data_index)
    for row, report in drive(run, loop, measure):
        described = {**card, "epochs": row["epoch"], "metrics": report.rounded() if report else {}}
        if report and row["epoch"] % args.save_every == 0:
            run.save()  # or the file would be in the way of --resume after a power cut
            save_with_card(run.folder / f"model_{row['epoch']}.th", network.state_dict(), described)
    save_with_card(run.folder / "last_model.th", network.state_dict(), described)
    for name, state_dict in loop.companions().items():
        save_with_card(run.folder / f"{name}.th", state_dict, {"content": name, "trained_with": described})
    write_trigger(run.folder, loop.draw_trigger(dataset.test), dataset, data_index)
    plot_training(run.folder / "train_curves.png", run.log.rows)
    announce(f"saved {run.folder / 'last_model.th'}: {report}; {run.seconds:.0f} s")
    if report.triggered and report.triggered.accuracy < TAKEN_HOLD:
        announce("warning: the attack has hardly taken hold; train longer, or raise --poison-rate or --trigger-alpha")


def main(argv: list[str] | None = None) -> int:
    """Run step 1; returns the exit status."""
    if join():
        return follow()
    args, attack, config = parse_arguments(argv)
    command = command_line("train_backdoor_cifar.py", argv)
    return run_script(
        partial(train, args, attack, config), "train", args, command, OUTPUTS["train"], partial(locate_inputs, args)
    )


if __name__ == "__main__":
    leave(main())
