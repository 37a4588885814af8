"""The flags of the attacks. Their defaults are the attacks' own and stand in the registry."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from attacks import ATTACKS
from utils.arguments import number


class Flag(NamedTuple):
    """A flag that some attacks take: its argparse type, metavar and help."""

    kind: Callable[[str], Any]
    metavar: str
    help: str


SHARE = number(float, 0, 1, open_low=True)
PIXEL_STEP = number(float, 0, 255, open_low=True)

FLAGS = {
    "poison_rate": Flag(
        SHARE,
        "X",
        "share of the images that may be poisoned and are, above 0, at most 1: of the non-target training images; "
        "of the target class for sig and clean-label; of all images for badnets-all; of each batch for iab-*",
    ),
    "poison_target": Flag(number(int, 0), "CLASS", "class that the trigger shall lead to, 0 or more"),
    "trigger_alpha": Flag(SHARE, "X", "opacity of the trigger, above 0, at most 1; 1 is fully opaque"),
    "cross_rate": Flag(
        SHARE, "X", "share of each batch that carries another image's trigger and keeps its label, above 0, below 1"
    ),
    "sig_delta": Flag(PIXEL_STEP, "X", "amplitude of the signal, above 0, at most 255 (a pixel's full range)"),
    "sig_frequency": Flag(number(float, 0, open_low=True), "X", "periods of the signal across the picture, above 0"),
    "clb_surrogate": Flag(
        str, "FILE", "a clean network (step 1 with --poison-type benign) against which the clean-label set is built"
    ),
    "clb_dir": Flag(
        str, "DIR", "a clean-label set to read instead: train_images.npy and train_labels.npy of all training images"
    ),
    "clb_eps": Flag(number(float, 0, 255), "X", "Linf size of the adversarial perturbation, 0 to 255"),
    "clb_steps": Flag(number(int, 1), "N", "PGD steps, 1 or more"),
    "clb_step_size": Flag(PIXEL_STEP, "X", "size of a PGD step, above 0, at most 255"),
    "poisoned_dir": Flag(
        str,
        "DIR",
        "a poisoned set as pictures, as --export-poisoned writes it: poisoned.csv, its pictures, trigger_info.th",
    ),
}


def add_attack_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every attack. Unset ones stay None, so that contradictions can be told from defaults."""
    group = parser.add_argument_group("attack")
    group.add_argument(
        "--poison-type", choices=list(ATTACKS), default="badnets", help="the attack; benign trains a clean network"
    )
    for name, flag in FLAGS.items():
        group.add_argument(
            _spelled(name),
            type=flag.kind,
            metavar=flag.metavar,
            help=f"{flag.help} (default: {describe_default(name)})",
        )
    group.add_argument(
        "--export-poisoned",
        metavar="DIR",
        help="write the poisoned set as PNG files by class, with a table of what was done to which image",
    )


def _spelled(name: str) -> str:
    return "--" + name.replace("_", "-")


def describe_default(name: str) -> str:
    """Say which attack takes a flag with which default, for the help."""
    takers: dict[str, list[str]] = {}
    for attack_name, attack in ATTACKS.items():
        for value in (options[name] for options in (attack.training, attack.options) if name in options):
            shown = " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
            takers.setdefault(shown, []).append(attack_name)
    return "; ".join(f"{shown} for {', '.join(of)}" for shown, of in takers.items())


def complete_arguments(args: argparse.Namespace) -> None:
    """Fill in the chosen attack's defaults.

    Raises:
        ValueError: a flag was given that the attack does not take, or flags contradict each other.
    """
    attack = ATTACKS[args.poison_type]
    options = {**attack.training, **attack.options}
    owned = {name for other in ATTACKS.values() for name in (*other.training, *other.options)}
    for name in sorted(owned - options.keys()):
        if getattr(args, name) is not None:
            raise ValueError(f"{_spelled(name)} has no effect with --poison-type {args.poison_type}; leave it out")
    unset = attack.check(args)
    for name, default in options.items():
        if getattr(args, name) is None and name not in unset:
            setattr(args, name, default)
