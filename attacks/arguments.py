"""The flags of the attacks. Their defaults are the attacks' own and stand in the registry."""

import argparse
from typing import Any

from attacks import ATTACKS
from utils.arguments import number

PIXELS = "0..255 scale"


def add_attack_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every attack. Unset ones stay None, so that contradictions can be told from defaults."""
    group = parser.add_argument_group("attack")
    group.add_argument(
        "--poison-type", choices=list(ATTACKS), default="badnets", help="the attack; benign trains a clean network"
    )
    _add(
        group, "--poison-rate", number(float, 0, 1, open_low=True), "X",
        "share of the images that may be poisoned and are, above 0, at most 1: of the non-target training images; "
        "of the target class for sig and clean-label; of all images for badnets-all; of each batch for iab-*",
    )  # fmt: skip
    _add(group, "--poison-target", number(int, 0), "CLASS", "class that the trigger shall lead to, 0 or more")
    _add(
        group, "--trigger-alpha", number(float, 0, 1, open_low=True), "X",
        "opacity of the trigger, above 0, at most 1; 1 is fully opaque",
    )  # fmt: skip
    _add(
        group, "--cross-rate", number(float, 0, 1, open_low=True), "X",
        "share of each batch that carries another image's trigger and keeps its label, above 0, below 1",
    )  # fmt: skip
    _add(group, "--sig-delta", number(float, 0, 255, open_low=True), "X", f"amplitude of the signal, {PIXELS}, above 0")
    _add(group, "--sig-frequency", number(float, 0, open_low=True), "X", "periods of the signal, above 0")
    _add(
        group, "--clb-surrogate", str, "FILE",
        "a clean network (step 1 with --poison-type benign) against which the clean-label set is built",
    )  # fmt: skip
    _add(
        group, "--clb-dir", str, "DIR",
        "a clean-label set to read instead: train_images.npy and train_labels.npy of all training images",
    )  # fmt: skip
    _add(group, "--clb-eps", number(float, 0, 255), "X", f"size of the adversarial perturbation, Linf, {PIXELS}")
    _add(group, "--clb-steps", number(int, 1), "N", "PGD steps, 1 or more")
    _add(group, "--clb-step-size", number(float, 0, 255, open_low=True), "X", f"size of a PGD step, {PIXELS}, above 0")
    _add(
        group, "--poisoned-dir", str, "DIR",
        "a poisoned set as pictures, as --export-poisoned writes it: poisoned.csv, its pictures, trigger_info.th",
    )  # fmt: skip
    group.add_argument(
        "--export-poisoned",
        metavar="DIR",
        help="write the poisoned set as PNG files by class, with a table of what was done to which image",
    )


def _add(group: argparse._ArgumentGroup, flag: str, kind: Any, metavar: str, text: str) -> None:
    """Add a flag and say which attack takes it with which default."""
    name = flag.removeprefix("--").replace("-", "_")
    defaults: dict[Any, list[str]] = {}
    for attack_name, attack in ATTACKS.items():
        if name in attack.options:
            defaults.setdefault(attack.options[name], []).append(attack_name)
    shown = "; ".join(f"{'none' if value is None else value} for {', '.join(of)}" for value, of in defaults.items())
    group.add_argument(flag, type=kind, metavar=metavar, help=f"{text} (default: {shown})")


def complete_arguments(args: argparse.Namespace) -> None:
    """Fill in the chosen attack's defaults.

    Raises:
        ValueError: a flag was given that the attack does not take, or flags contradict each other.
    """
    attack = ATTACKS[args.poison_type]
    options = {**attack.training, **attack.options}
    for name in {name for other in ATTACKS.values() for name in (*other.training, *other.options)} - options.keys():
        if getattr(args, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} has no effect with --poison-type {args.poison_type}; leave it out")
    attack.check(args)
    for name, default in options.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
