"""From the command line to an attack and its training."""

import argparse
from dataclasses import fields
from typing import Any

from attacks import ATTACKS, Attack, PoisonedSet
from engine.training import TrainConfig
from utils.config import (
    add_alternative_flags,
    from_flags,
    given_flags,
    not_empty,
    record_flags,
    refuse_foreign_flags,
)

DEFAULT_ATTACK = "badnets"


def add_attack_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the training and of every attack; unset ones stay None until an attack is chosen."""
    training = parser.add_argument_group("training")
    add_alternative_flags(training, {name: attack.train_config for name, attack in ATTACKS.items()})
    group = parser.add_argument_group("attack")
    group.add_argument(
        "--poison-type",
        choices=list(ATTACKS),
        default=DEFAULT_ATTACK,
        help=f"the attack; benign trains a clean network (default: {DEFAULT_ATTACK})",
    )
    add_alternative_flags(group, ATTACKS)
    group.add_argument(
        "--export-poisoned",
        type=not_empty(str),
        metavar="DIR",
        help="write the poisoned set as PNG files by class, with a table of what was done to which image",
    )


def read_attack(args: argparse.Namespace) -> tuple[Attack, TrainConfig]:
    """Return the chosen attack and its training, and write their defaults into ``args``.

    Raises:
        ValueError: a flag was given that the attack does not take, or flags contradict each other.
    """
    chosen, name = ATTACKS[args.poison_type], args.poison_type
    for kind in ("attack", "training"):
        configs = [attack if kind == "attack" else attack.train_config for attack in ATTACKS.values()]
        taken = chosen if kind == "attack" else chosen.train_config
        refuse_foreign_flags(args, configs, taken, f"--poison-type {name}")
    attack, config = chosen.from_given(given_flags(args, chosen)), from_flags(chosen.train_config, args)
    if config.lr_schedule != "step":
        if args.schedule:
            raise ValueError(f"--schedule has no effect with --lr-schedule {config.lr_schedule}; leave it out")
        config = from_flags(chosen.train_config, args, milestones=())
    if config.epochs < attack.shortest:
        raise ValueError(
            f"--epoch {config.epochs}: {name} trains its mask generator in the first epoch; "
            f"use {attack.shortest} or more"
        )
    if args.export_poisoned and not attack.poisons_once:
        raise ValueError(f"--export-poisoned: with --poison-type {name} there is no set to export")
    record_flags(config, args)
    for each in fields(attack):
        setattr(args, each.name, getattr(attack, each.name))
    return attack, config


def describe(attack: Attack, name: str, poisoned: PoisonedSet) -> dict[str, Any]:
    """Return what a model card says about an attack."""
    known = {"poison_type": name, **{each.name: getattr(attack, each.name) for each in fields(attack)}}
    if poisoned.trigger:
        known["trigger_alpha"] = poisoned.trigger.alpha
    known["poisoned_images"] = len(poisoned.index) or None
    return {key: str(value) if isinstance(value, str) else value for key, value in known.items() if value is not None}
