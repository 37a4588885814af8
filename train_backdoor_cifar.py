"""Step 1: train a backdoored network on poisoned CIFAR-10.

A CPU minute, nothing to download:
    python train_backdoor_cifar.py --dataset synthetic --widen-factor 0.25 --epoch 8 --lr-schedule one-cycle

The paper (ResNet-18, BadNets 5 %, target 0; hours on a GPU):
    python train_backdoor_cifar.py --output-dir ./save

Writes to the output folder: last_model.th and its card last_model.json, model_init.th, model_{epoch}.th,
trigger_info.th, train_log.jsonl, train_curves.png, clean_and_triggered.png.
"""

import argparse
import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import nn

from data.attacks import ATTACKS, AttackConfig, PoisonedSet
from data.datasets import Dataset, ImageSet, load_dataset
from data.errors import InputError
from data.seeding import seeded_generator
from data.split import absolute, attacker_index, load_permutation, permutation_digest
from data.triggers import Trigger
from models import build_model
from utils.arguments import (
    DEFAULT_MILESTONES,
    DEFAULT_POISON_RATE,
    DEFAULT_TARGET,
    add_attack_arguments,
    add_compute_arguments,
    add_data_arguments,
    add_model_arguments,
    add_output_arguments,
    add_seed_argument,
    add_training_arguments,
    make_parser,
)
from utils.cards import save_with_card
from utils.evaluation import Evaluator
from utils.plots import plot_images, plot_training
from utils.run import Run, announce, command_line, run_script, versions
from utils.runtime import Runtime
from utils.training import TrainConfig, fit
from utils.trigger_file import save_trigger


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of step 1."""
    parser = make_parser(__doc__)
    add_training_arguments(parser)
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
    attack = ATTACKS[args.poison_type]
    unused = {"--clb-dir": args.clb_dir and not (attack and attack.needs_folder)}
    unused["--poison-rate"] = args.poison_rate is not None and (attack is None or attack.needs_folder)
    unused["--trigger-alpha"] = args.trigger_alpha is not None and (attack is None or attack.needs_folder)
    unused["--poison-target"] = args.poison_target is not None and attack is None
    for flag, contradicts in unused.items():
        if contradicts:
            parser.error(f"{flag} has no effect with --poison-type {args.poison_type}; leave it out")
    if attack and attack.needs_folder and not args.clb_dir:
        parser.error(f"--poison-type {args.poison_type} needs --clb-dir DIR with train_images.npy and train_labels.npy")
    if args.schedule and args.lr_schedule != "step":
        parser.error(f"--schedule has no effect with --lr-schedule {args.lr_schedule}; leave it out")
    return args


def poison(args: argparse.Namespace, dataset: Dataset, train_index: torch.Tensor) -> tuple[PoisonedSet | None, dict]:
    """Poison the attacker's images; returns None and the card's entry for a benign network.

    Raises:
        InputError: the target is no class of the dataset, or the attack cannot be carried out.
    """
    attack = ATTACKS[args.poison_type]
    if attack is None:
        return None, {"poison_type": args.poison_type}
    target = DEFAULT_TARGET if args.poison_target is None else args.poison_target
    if target >= dataset.num_classes:
        raise InputError(f"--poison-target {target}: {dataset.name} has the classes 0..{dataset.num_classes - 1}")
    alpha = attack.default_alpha if args.trigger_alpha is None else args.trigger_alpha
    config = AttackConfig(target, args.poison_rate or DEFAULT_POISON_RATE, alpha, args.seed, args.clb_dir)
    poisoned = attack.poison(dataset.train, train_index, config)
    count = len(poisoned.trigger.data_index)
    share = 100 * count / len(train_index)
    announce(
        f"{args.poison_type}: {count} of {len(train_index)} training images poisoned ({share:.2f} %), "
        f"target {target}, opacity {alpha}"
    )
    return poisoned, {
        "poison_type": args.poison_type,
        "target": target,
        "poison_rate": None if attack.needs_folder else config.rate,
        "poisoned_images": count,
        "trigger_alpha": alpha,
    }


def start_network(args: argparse.Namespace, dataset: Dataset, runtime: Runtime) -> nn.Module:
    """Build the network with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded_generator(args.seed, "initial weights").initial_seed())
        network = build_model(args.arch, dataset.num_classes, args.widen_factor)
    return network.to(runtime.device, memory_format=torch.channels_last)


def make_card(
    args: argparse.Namespace, run: Run, dataset: Dataset, permutation: torch.Tensor, attack: dict
) -> dict[str, Any]:
    """Return what the model card says about every checkpoint of this run."""
    return {
        "arch": args.arch,
        "widen_factor": args.widen_factor,
        "num_classes": dataset.num_classes,
        "dataset": dataset.name,
        "normalization": asdict(dataset.normalization),
        "split": {"file": absolute(args.split_file), "sha256": permutation_digest(permutation)},
        "attack": attack,
        "seed": args.seed,
        "command": run.command,
        "versions": versions(),
    }


def write_trigger(run: Run, clean_test: ImageSet, trigger: Trigger) -> None:
    """Write the trigger file and the picture of clean and triggered images."""
    save_trigger(run.folder / "trigger_info.th", trigger)
    index = torch.nonzero(clean_test.labels.cpu() != trigger.target).flatten()[:8]
    clean = clean_test.images[index]
    plot_images(run.folder / "clean_and_triggered.png", clean, trigger.stamp(clean, index))


def clear_folder(run: Run) -> None:
    """Make sure that nothing of an older training is left to be taken for this one's.

    Raises:
        InputError: a trained network is there and ``--overwrite`` was not given.
    """
    if (run.folder / "last_model.th").exists() and not run.overwriting:
        raise InputError(f"{run.folder / 'last_model.th'} is there already; choose another --output-dir or --overwrite")
    for pattern in (
        "last_model.*",
        "model_*.th",
        "model_*.json",
        "trigger_info.th",
        "clean_and_triggered.png",
        "train_log.jsonl",
        "train_curves.png",
    ):
        for path in run.folder.glob(pattern):
            path.unlink()


def train(args: argparse.Namespace, run: Run) -> None:
    """Carry out step 1 in the run's folder."""
    runtime = run.prepare_runtime()
    dataset = load_dataset(args.dataset, args.data_dir, runtime.device)
    permutation = load_permutation(args.split_file, len(dataset.train))
    train_index = attacker_index(permutation)
    poisoned, attack_card = poison(args, dataset, train_index)
    train_set = poisoned.train if poisoned else dataset.train[train_index]
    trigger = poisoned.trigger if poisoned else None
    evaluator = Evaluator(dataset.test, trigger, None, dataset.normalization, runtime.precision)
    config = TrainConfig(
        args.epoch,
        args.batch_size,
        args.lr,
        args.lr_schedule,
        tuple(args.schedule or DEFAULT_MILESTONES),
        seed=args.seed,
        precision=runtime.precision,
    )
    network = start_network(args, dataset, runtime)
    card = make_card(args, run, dataset, permutation, attack_card)
    if not run.saved:
        clear_folder(run)
        save_with_card(run.folder / "model_init.th", network.state_dict(), {**card, "epochs": 0})
    if trigger:
        write_trigger(run, dataset.test, trigger)
    for row, report in fit(run, network, train_set, dataset.normalization, config, evaluator):
        described = {**card, "epochs": row["epoch"], "metrics": report.rounded()}
        if row["epoch"] % args.save_every == 0:
            save_with_card(run.folder / f"model_{row['epoch']}.th", network.state_dict(), described)
    save_with_card(run.folder / "last_model.th", network.state_dict(), described)
    plot_training(run.folder / "train_curves.png", run.log.rows)
    announce(f"saved {run.folder / 'last_model.th'}: {report}; {run.seconds:.0f} s")


def main(argv: list[str] | None = None) -> int:
    """Run step 1; returns the exit status."""
    args = parse_arguments(argv)
    return run_script(partial(train, args), "train", args, command_line("train_backdoor_cifar.py", argv))


if __name__ == "__main__":
    sys.exit(main())
