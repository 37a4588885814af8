"""Step 1: train a backdoored network on poisoned CIFAR-10.

A CPU minute, nothing to download:
    python train_backdoor_cifar.py --dataset synthetic --widen-factor 0.25 --epoch 8 --lr-schedule one-cycle

The paper (ResNet-18, BadNets 5 %, target 0; hours on a GPU):
    python train_backdoor_cifar.py --output-dir ./save

Writes to the output folder: last_model.th and its card last_model.json, model_init.th, model_{epoch}.th,
trigger_info.th, train_log.jsonl, train_curves.png, clean_and_triggered.png; generators.th for input-aware attacks and
clean_label_set/ for clean-label.
"""

import argparse
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attacks import ATTACKS, AttackContext, PoisonedSet
from attacks.arguments import add_attack_arguments, complete_arguments, describe_default
from attacks.image_folder import export_poisoned, refuse_other_files
from data.datasets import Dataset, ImageSet, load_dataset
from data.errors import InputError
from data.seeding import seeded_weights
from data.split import absolute, attacker_index, load_permutation, permutation_digest
from data.triggers import Trigger
from models import build_model
from utils.arguments import (
    add_compute_arguments,
    add_data_arguments,
    add_model_arguments,
    add_output_arguments,
    add_seed_argument,
    add_training_arguments,
    make_parser,
)
from utils.cards import save_with_card
from utils.plots import plot_images, plot_training
from utils.run import Run, announce, command_line, run_script, versions
from utils.runtime import Runtime
from utils.training import TrainConfig, fit
from utils.trigger_file import save_trigger


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of step 1."""
    parser = make_parser(__doc__)
    add_training_arguments(parser, describe_default)
    add_attack_arguments(parser)
    add_model_arguments(parser, from_card=False)
    add_data_arguments(parser, default_dataset="cifar10")
    add_seed_argument(parser)
    add_compute_arguments(parser)
    add_output_arguments(parser, resumable=True)
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse, and refuse flags that contradict each other (exit status 2)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.schedule and args.lr_schedule != "step":
        parser.error(f"--schedule has no effect with --lr-schedule {args.lr_schedule}; leave it out")
    try:
        complete_arguments(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def poison(context: AttackContext) -> PoisonedSet:
    """Make the attacker's training set and say what was done.

    Raises:
        InputError: the attack cannot be carried out.
    """
    name = context.options.poison_type
    poisoned = ATTACKS[name].poison(context)
    count, total = poisoned.count, len(poisoned.train)
    if count:
        announce(f"{name}: {count} of {total} training images poisoned ({100 * count / total:.2f} %)")
    return poisoned


def attack_card(args: argparse.Namespace, poisoned: PoisonedSet) -> dict[str, Any]:
    """Return what a model card says about the attack."""
    options = {name: getattr(args, name) for name in ATTACKS[args.poison_type].options}
    opacity = {"trigger_alpha": poisoned.trigger.alpha} if poisoned.trigger else {}
    known = {"poison_type": args.poison_type, **options, **opacity, "poisoned_images": poisoned.count}
    return {name: value for name, value in known.items() if value is not None}


def start_network(args: argparse.Namespace, dataset: Dataset, runtime: Runtime) -> nn.Module:
    """Build the network with weights that depend on the seed alone."""
    with seeded_weights(args.seed, "initial weights"):
        network = build_model(args.arch, dataset.num_classes, args.widen_factor)
    return network.to(runtime.device, memory_format=torch.channels_last)


def train_config(args: argparse.Namespace, runtime: Runtime) -> TrainConfig:
    """Return the settings of the training."""
    milestones = tuple(args.schedule or ())
    return TrainConfig(
        args.epoch, args.batch_size, args.lr, args.lr_schedule, milestones, seed=args.seed, precision=runtime.precision
    )


def make_card(
    args: argparse.Namespace, run: Run, dataset: Dataset, permutation: torch.Tensor, poisoned: PoisonedSet
) -> dict[str, Any]:
    """Return what the model card says about every checkpoint of this run."""
    return {
        "arch": args.arch,
        "widen_factor": args.widen_factor,
        "num_classes": dataset.num_classes,
        "dataset": dataset.name,
        "normalization": asdict(dataset.normalization),
        "split": {"file": absolute(args.split_file), "sha256": permutation_digest(permutation)},
        "attack": attack_card(args, poisoned),
        "seed": args.seed,
        "command": run.command,
        "versions": versions(),
    }


def write_trigger(run: Run, clean_test: ImageSet, trigger: Trigger) -> None:
    """Write the trigger file and the picture of clean and triggered images."""
    save_trigger(run.folder / "trigger_info.th", trigger)
    index = torch.nonzero(clean_test.labels.cpu() != trigger.target).flatten()[:8]
    clean = clean_test.images[index.to(clean_test.images.device)]
    plot_images(run.folder / "clean_and_triggered.png", clean, trigger.stamp(clean, index))


def refuse_to_lose_files(args: argparse.Namespace, run: Run) -> None:
    """Make sure, before any work is done, that no trained network and no input is lost.

    Raises:
        InputError: a trained network is there, and neither ``--overwrite`` was given nor is this run a continuation;
            an input would be overwritten; other files lie where the poisoned set shall go.
    """
    output = run.folder.absolute()
    if args.clb_surrogate and Path(args.clb_surrogate).absolute().parent == output:
        raise InputError(f"--clb-surrogate {args.clb_surrogate} lies in --output-dir; choose another --output-dir")
    for flag, path in (("--clb-dir", args.clb_dir), ("--poisoned-dir", args.poisoned_dir)):
        if path and Path(path).absolute() in (output, *output.parents):
            raise InputError(f"{flag} {path} holds --output-dir {run.folder}; choose another --output-dir")
    if args.export_poisoned:
        refuse_other_files(Path(args.export_poisoned))
    if (run.folder / "last_model.th").exists() and not (run.overwriting or run.saved):
        raise InputError(f"{run.folder / 'last_model.th'} is there already; choose another --output-dir or --overwrite")


def clear_folder(run: Run) -> None:
    """Make sure that nothing of an older training is left to be taken for this one's."""
    for pattern in (
        "last_model.*",
        "model_*.th",
        "model_*.json",
        "generators.*",
        "trigger_info.th",
        "clean_and_triggered.png",
        "train_log.jsonl",
        "train_curves.png",
    ):
        for path in run.folder.glob(pattern):
            path.unlink()


def train(args: argparse.Namespace, run: Run) -> None:
    """Carry out step 1 in the run's folder."""
    refuse_to_lose_files(args, run)
    runtime = run.prepare_runtime()
    dataset = load_dataset(args.dataset, args.data_dir, runtime.device)
    permutation = load_permutation(args.split_file, len(dataset.train))
    context = AttackContext(dataset, attacker_index(permutation), permutation, args, run, runtime)
    poisoned = poison(context)
    if args.export_poisoned:
        export_poisoned(context, poisoned, Path(args.export_poisoned))
    network = start_network(args, dataset, runtime)
    trainer = ATTACKS[args.poison_type].make_trainer(network, poisoned, train_config(args, runtime), context)
    card = make_card(args, run, dataset, permutation, poisoned)
    if not run.saved:
        clear_folder(run)
        save_with_card(run.folder / "model_init.th", network.state_dict(), {**card, "epochs": 0})
    if poisoned.trigger:
        write_trigger(run, dataset.test, poisoned.trigger)
    for row, report in fit(run, trainer):
        described = {**card, "epochs": row["epoch"], "metrics": report.rounded() if report else {}}
        if report and row["epoch"] % args.save_every == 0:
            save_with_card(run.folder / f"model_{row['epoch']}.th", network.state_dict(), described)
    save_with_card(run.folder / "last_model.th", network.state_dict(), described)
    for name, state_dict in trainer.companions().items():
        save_with_card(run.folder / f"{name}.th", state_dict, {"content": name, "trained_with": described})
    if trainer.trigger is not poisoned.trigger:  # learnt with the network
        write_trigger(run, dataset.test, trainer.trigger)
    plot_training(run.folder / "train_curves.png", run.log.rows)
    announce(f"saved {run.folder / 'last_model.th'}: {report}; {run.seconds:.0f} s")


def main(argv: list[str] | None = None) -> int:
    """Run step 1; returns the exit status."""
    args = parse_arguments(argv)
    return run_script(partial(train, args), "train", args, command_line("train_backdoor_cifar.py", argv))


if __name__ == "__main__":
    sys.exit(main())
