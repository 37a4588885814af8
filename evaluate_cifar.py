"""Measure a network: clean accuracy (C-Acc), attack success rate (ASR), and robust accuracy (R-Acc).

R-Acc is the share of triggered images that are given their true class; a repair should bring the ASR down and R-Acc up.
Nothing is written.

A network from step 1 or 3, or of the zoo:
    python evaluate_cifar.py --checkpoint badnets-0 --trigger-info badnets-0

Another toolkit's checkpoint with pictures that have its trigger (docs/checkpoints.md):
    python evaluate_cifar.py --checkpoint attack_result.pt --triggered-images bd_test_dataset

Without a trigger or such pictures only C-Acc is known.
"""

if __name__ == "__main__":  # before the imports below, which take seconds
    from utils.console import prepare_process

    prepare_process()

import argparse
from functools import partial

from data.datasets import FolderConfig
from engine.drive import UNTRAINED_REMEDY
from engine.evaluation import Evaluator, NotFinite
from engine.memory import check_step, pruning_bytes
from engine.runtime import RuntimeConfig, prepare_runtime
from formats.network import add_network_flags, load_network
from formats.zoo import locate_inputs
from utils.config import add_flags, from_flags, make_parser
from utils.console import announce, leave
from utils.errors import InputError
from utils.guard import guard


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the evaluation."""
    parser = make_parser(__doc__)
    add_network_flags(parser)
    add_flags(parser.add_argument_group("source"), FolderConfig)
    add_flags(parser.add_argument_group("computation"), RuntimeConfig)
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Measure the network and print one line; raises ``InputError`` as ``load_network`` and where it only gives NaN."""
    locate_inputs(args)
    runtime = prepare_runtime(from_flags(RuntimeConfig, args))
    announce(f"computing on {runtime}")
    loaded = load_network(args, from_flags(FolderConfig, args).data_dir, runtime)
    test = loaded.dataset.test
    measure = Evaluator(test, loaded.attack, loaded.normalization, runtime.precision, robust=True)
    check_step(pruning_bytes, loaded.network, measure.batch_size, runtime, test)
    try:
        announce(str(measure(loaded.network)))
    except NotFinite as error:
        raise InputError(f"{error}; {UNTRAINED_REMEDY}") from error


def main(argv: list[str] | None = None) -> int:
    """Measure a network; returns the exit status."""
    args = build_parser().parse_args(argv)
    return guard(partial(evaluate, args), "evaluate")


if __name__ == "__main__":
    leave(main())
