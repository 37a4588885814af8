"""The networks of zoo/: made from finished runs of step 1, in half precision, and measured again as they lie there.

Add a network, with its trigger and a card that says how it was made and what it measures after rounding:
    python -m benchmarks.zoo add ./save/badnets-0 zoo/badnets-0

Measure networks and compare with their cards (exit status 1 where one differs):
    python -m benchmarks.zoo check zoo/badnets-0 zoo/benign-0
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.datasets import ImageSet, Normalization, load_dataset
from engine.evaluation import Evaluator
from formats.cards import read_card, save_with_card
from formats.checkpoints import load_strictly, read_state_dict
from formats.network import build_network, settle_model
from formats.trigger_file import load_trigger
from utils.config import make_parser
from utils.console import announce
from utils.errors import InputError
from utils.guard import guard

WEIGHTS, TRIGGER = "last_model.th", "trigger_info.th"
NEEDED = {"arch", "widen_factor", "num_classes", "dataset", "normalization", "metrics"}  # of a card
TOLERANCE = 0.05  # percentage points between a card and what is measured: a few images, by another processor


def read_network(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a folder, in float32 and eval mode, and its card.

    Raises:
        InputError: the file or its card is missing, damaged, or they do not go together.
    """
    card = read_card(folder / WEIGHTS)
    missing = NEEDED - (card or {}).keys()
    if card is None or missing:
        what = f"its card has no {min(missing)}" if card else "no card beside it"
        raise InputError(f"{folder / WEIGHTS}: {what}; step 1 writes one")
    path, state_dict = str(folder / WEIGHTS), read_state_dict(folder / WEIGHTS)
    return build_network(path, state_dict, settle_model(path, card, {}), card["num_classes"]), card


def measure(folder: Path, network: nn.Module, card: dict[str, Any], test: ImageSet) -> dict[str, float]:
    """Return C-Acc and, where there is a trigger, ASR in percent, computed in float32; raises as ``load_trigger``."""
    path = folder / TRIGGER
    trigger = load_trigger(path, test.num_classes) if path.exists() else None
    normalization = Normalization(**{name: tuple(value) for name, value in card["normalization"].items()})
    return Evaluator(test, trigger, normalization, torch.float32)(network).rounded()


def add(source: Path, target: Path, data_dir: str) -> None:
    """Copy a network into the zoo in half precision.

    Raises:
        InputError: there is no network with a card, it does not survive the rounding, or the folder is there already.
        OSError: the folder cannot be written.
    """
    if target.exists():
        raise InputError(f"{target} is there already; remove it or choose another")
    network, card = read_network(source)
    state = {name: t.half() if t.is_floating_point() else t for name, t in network.state_dict().items()}
    load_strictly(network, state, source / WEIGHTS)
    test = load_dataset(card["dataset"], data_dir).test
    known = {name: value for name, value in card.items() if name not in ("card_version", "sha256")}
    before = known.pop("metrics")
    metrics = measure(source, network, card, test)
    target.mkdir(parents=True, exist_ok=True)
    if (source / TRIGGER).exists():
        shutil.copyfile(source / TRIGGER, target / TRIGGER)
    described = {**known, "weights": "float16", "metrics": metrics, "metrics_before_rounding": before}
    save_with_card(target / WEIGHTS, state, described)
    announce(f"{target}: {metrics}, before rounding {before}")


def check(folder: Path, data_dir: str) -> bool:
    """Measure a network again; returns whether its card says the same. Raises as ``read_network`` and ``measure``."""
    network, card = read_network(folder)
    test = load_dataset(card["dataset"], data_dir).test
    found = measure(folder, network, card, test)
    said = card["metrics"]
    same = found.keys() == said.keys() and all(abs(found[name] - said[name]) <= TOLERANCE for name in found)
    announce(f"{folder}: {found}" + ("" if same else f", but the card says {said}"))
    return same


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the zoo."""
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="action", required=True, metavar="add | check")
    adding = commands.add_parser("add", help="copy a finished run of step 1 into the zoo, in half precision")
    adding.add_argument("source", type=Path, help="output folder of the run")
    adding.add_argument("target", type=Path, help="folder to be made")
    checking = commands.add_parser("check", help="measure networks and compare with their cards")
    checking.add_argument("folders", type=Path, nargs="+", help="folders of the zoo")
    for command in (adding, checking):
        command.add_argument("--data-dir", default="../data", metavar="DIR", help="folder of the dataset's files")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = build_parser().parse_args(argv)
    right: list[bool] = []

    def work() -> None:
        if args.action == "add":
            add(args.source, args.target, args.data_dir)
        else:
            right.extend(check(folder, args.data_dir) for folder in args.folders)

    return guard(work, "zoo") or int(not all(right))


if __name__ == "__main__":
    sys.exit(main())
