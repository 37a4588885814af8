"""Measure a network: clean accuracy (C-Acc), attack success rate (ASR), and robust accuracy (R-Acc).

R-Acc is the share of triggered images that are given their true class; a repair should bring the ASR down and R-Acc up.
Nothing is written, but for the figures that ``--json FILE`` asks for.

A network from step 1 or 3, or of the zoo:
    python evaluate_cifar.py --checkpoint badnets-0 --trigger-info badnets-0 --json save/badnets-0.json

Another toolkit's checkpoint with pictures that have its trigger (docs/checkpoints.md):
    python evaluate_cifar.py --checkpoint attack_result.pt --triggered-images bd_test_dataset

Without a trigger or such pictures only C-Acc is known.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.console import prepare_process

    prepare_process()

import argparse
import os
from functools import partial
from pathlib import Path

from data.datasets import FolderConfig
from engine.drive import UNTRAINED_REMEDY
from engine.evaluation import Evaluator, NotFinite
from engine.memory import check_step, pruning_bytes
from engine.runtime import RuntimeConfig, prepare_runtime
from formats.network import add_network_flags, load_network
from formats.zoo import locate_inputs
from utils.config import add_flags, from_flags, make_parser, not_empty
from utils.console import announce, leave
from utils.errors import InputError
from utils.files import as_json, read_json, sha256_of, write_bytes
from utils.guard import guard
from utils.run import command_line, versions

CONTENT = "evaluation"  # of the JSON file, so that no other file is ever replaced


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the evaluation."""
    parser = make_parser(__doc__)
    add_network_flags(parser)
    add_flags(parser.add_argument_group("source"), FolderConfig)
    add_flags(parser.add_argument_group("computation"), RuntimeConfig)
    parser.add_argument_group("output").add_argument(
        "--json", type=not_empty(str), metavar="FILE", help="also write the figures, in percent, to this JSON file"
    )
    return parser


def refuse_other_file(path: Path) -> None:
    """Raise ``InputError`` where figures cannot be written: no such folder, or a file that holds anything else."""
    if not path.parent.is_dir():
        raise InputError(f"--json {path}: there is no folder {path.parent}; make it first")
    if os.path.lexists(path) and read_json(path).get("content") != CONTENT:
        raise InputError(f"--json {path}: is there already and holds no figures; choose another name")


def evaluate(args: argparse.Namespace, command: str) -> None:
    """Measure the network and print one line; raises ``InputError`` as ``load_network`` and where it only gives NaN."""
    if args.json:
        refuse_other_file(Path(args.json))
    locate_inputs(args)
    runtime = prepare_runtime(from_flags(RuntimeConfig, args))
    announce(f"computing on {runtime}")
    loaded = load_network(args, from_flags(FolderConfig, args).data_dir, runtime)
    test = loaded.dataset.test
    measure = Evaluator(test, loaded.attack, loaded.normalization, runtime.precision, robust=True)
    check_step(pruning_bytes, loaded.network, measure.batch_size, runtime, test)
    try:
        report = measure(loaded.network)
    except NotFinite as error:
        raise InputError(f"{error}; {UNTRAINED_REMEDY}") from error
    announce(str(report))
    if args.json:
        digest = sha256_of(loaded.path)
        found = {"metrics": report.rounded(), "checkpoint_sha256": digest, "command": command, "versions": versions()}
        write_bytes(args.json, as_json({"content": CONTENT, **found}))


def main(argv: list[str] | None = None) -> int:
    """Measure a network; returns the exit status."""
    args = build_parser().parse_args(argv)
    return guard(partial(evaluate, args, command_line("evaluate_cifar.py", argv)), "evaluate")


if __name__ == "__main__":
    leave(main())
