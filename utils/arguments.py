"""Argument groups of the three scripts; every default stands here, or with its attack in the registry."""

import argparse
import math
import re
from collections.abc import Callable

from data.datasets import DATASETS
from data.split import HELD_OUT
from models import ARCHITECTURES

DEFAULT_ARCH, DEFAULT_WIDTH, DEFAULT_DATASET = "resnet18", 1.0, "cifar10"
DEFAULT_THRESHOLD = 0.2  # the paper's operating point
DEFAULT_SWEEP = (0.9, 0.05)  # last threshold and step
SWEEP_SHARES = 80  # a sweep by number takes steps of 1/80 of the neurons, 1.25 %, as in the release's figure


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of the examples and shows each default once."""

    def _get_help_string(self, action):
        if action.default in (None, False, argparse.SUPPRESS) or "default" in action.help:
            return action.help
        return action.help + " (default: %(default)s)"


def make_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser that shows a script's docstring and accepts no abbreviated flags."""
    return argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)


def number(kind: type, low: float, high: float = math.inf, open_low: bool = False) -> Callable[[str], float]:
    """Return an argparse type: a number from ``low`` (excluded if ``open_low``) to ``high``.

    Raises:
        argparse.ArgumentTypeError: (the returned function) the number is out of range.
        ValueError: (the returned function) the text is no number.
    """

    def parse(text: str):
        value = kind(text)
        if not (low < value if open_low else low <= value) or not value <= high or not math.isfinite(value):
            lower = f"above {low:g}" if open_low else f"at least {low:g}"
            upper = " and finite" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {lower}{upper}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def device_name(text: str) -> str:
    """An argparse type: auto, cpu, cuda or cuda:N.

    Raises:
        argparse.ArgumentTypeError: the text is anything else.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:N")
    return text


def add_compute_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how to compute: device, data type, threads."""
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--device", type=device_name, default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N"
    )
    group.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="auto takes bf16 where the hardware computes in it, fp32 elsewhere",
    )
    group.add_argument(
        "--threads", type=number(int, 1, 1024), metavar="N", help="CPU threads, 1 to 1024 (default: all cores)"
    )


def add_seed_argument(parser: argparse.ArgumentParser) -> None:
    """Add the seed."""
    parser.add_argument(
        "--seed",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="0 or more; on a CPU the same seed and threads give the same bytes",
    )


def add_output_arguments(parser: argparse.ArgumentParser, resumable: bool) -> None:
    """Add where to write, and whether to go on with what is there."""
    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", default="./save", metavar="DIR", help="folder for everything the step writes")
    if resumable:
        choice = group.add_mutually_exclusive_group()
        choice.add_argument(
            "--resume",
            action="store_true",
            help="continue an interrupted run; on a CPU it ends bit-identical to one never interrupted",
        )
        choice.add_argument(
            "--overwrite", action="store_true", help="start again, dropping what this step left in the folder"
        )


def add_data_arguments(parser: argparse.ArgumentParser, default_dataset: str | None, split: bool = True) -> None:
    """Add dataset and split; ``default_dataset`` None means that the model card says which."""
    group = parser.add_argument_group("data")
    shown = "" if default_dataset else f" (default: the card's, else {DEFAULT_DATASET})"
    group.add_argument(
        "--dataset",
        choices=list(DATASETS),
        default=default_dataset,
        help="cifar10, or synthetic: drawn, nothing to download" + shown,
    )
    group.add_argument("--data-dir", default="../data", metavar="DIR", help="folder that holds cifar-10-batches-py")
    group.add_argument(
        "--batch-size", type=number(int, 2, 100_000), default=128, metavar="N", help="images in a batch, 2 or more"
    )
    if split:
        group.add_argument(
            "--split-file",
            metavar="FILE",
            help="a permutation of the training images, one index a line, such as the release's; needed for "
            "its published checkpoints (default: this project's own)",
        )


def add_model_arguments(parser: argparse.ArgumentParser, from_card: bool) -> None:
    """Add architecture and width; ``from_card`` means that the model card has them."""
    group = parser.add_argument_group("model")
    card = "the card's, else " if from_card else ""
    group.add_argument(
        "--arch",
        choices=list(ARCHITECTURES),
        default=None if from_card else DEFAULT_ARCH,
        help=f"network (default: {card}{DEFAULT_ARCH})",
    )
    group.add_argument(
        "--widen-factor",
        type=number(float, 0, 64, open_low=True),
        metavar="X",
        default=None if from_card else DEFAULT_WIDTH,
        help=f"multiplies all channel counts, above 0, at most 64 (default: {card}{DEFAULT_WIDTH})",
    )


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what steps 2 and 3 share: the network to repair, the trigger, the defender's share."""
    group = parser.add_argument_group("network to repair")
    group.add_argument("--checkpoint", "--checkpoints", required=True, metavar="FILE", help="the backdoored network")
    group.add_argument(
        "--trigger-info",
        default="",
        metavar="FILE",
        help="the trigger, to report the ASR; without it only clean accuracy is reported",
    )
    group.add_argument(
        "--val-frac",
        type=number(float, 0, HELD_OUT, open_low=True),
        default=0.01,
        metavar="X",
        help=f"the defender's clean images, a share of the training set, above 0, at most {HELD_OUT}; "
        "step 1 never trains on them",
    )
    for name, word in (("mean", "mean"), ("std", "standard deviation")):
        group.add_argument(
            f"--{name}",
            type=number(float, 0, open_low=name == "std"),
            nargs=3,
            metavar=("R", "G", "B"),
            help=f"{word} with which the network's input is normalised, on the 0..1 scale "
            "(default: the card's, else the dataset's)",
        )
    add_model_arguments(parser, from_card=True)
    add_data_arguments(parser, default_dataset=None)


def add_training_arguments(parser: argparse.ArgumentParser, describe_default: Callable[[str], str]) -> None:
    """Add the training of step 1; the defaults depend on the attack, and ``describe_default`` says how."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--epoch", type=number(int, 1), metavar="N", help=f"epochs, 1 or more (default: {describe_default('epoch')})"
    )
    group.add_argument(
        "--lr",
        type=number(float, 0, open_low=True),
        metavar="X",
        help=f"learning rate, above 0; the peak of one-cycle (default: {describe_default('lr')})",
    )
    group.add_argument(
        "--lr-schedule",
        choices=["step", "one-cycle"],
        default="step",
        help="step: x0.1 after the epochs of --schedule, as published; one-cycle: up for 30 %% of the "
        "run, then down to 0, further in fewer epochs",
    )
    group.add_argument(
        "--schedule",
        type=number(int, 1),
        nargs="+",
        metavar="N",
        help=f"epochs after which the step schedule drops the rate (default: {describe_default('schedule')})",
    )
    group.add_argument(
        "--save-every", type=number(int, 1), default=20, metavar="N", help="keep model_{epoch}.th every N epochs"
    )


def add_anp_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the mask optimisation of step 2."""
    group = parser.add_argument_group("adversarial neuron pruning")
    group.add_argument(
        "--lr",
        type=number(float, 0, open_low=True),
        default=0.2,
        metavar="X",
        help="learning rate of the masks, above 0",
    )
    group.add_argument("--nb-iter", type=number(int, 1), default=2000, metavar="N", help="mask updates, 1 or more")
    group.add_argument(
        "--print-every",
        type=number(int, 1),
        default=500,
        metavar="N",
        help="updates between two rows of the table, 1 or more",
    )
    group.add_argument(
        "--anp-eps",
        type=number(float, 0),
        default=0.4,
        metavar="X",
        help="size of the perturbation relative to the weights, 0 or more; 0: natural loss alone",
    )
    group.add_argument(
        "--anp-steps", type=number(int, 1), default=1, metavar="N", help="ascent steps of the perturbation, 1 or more"
    )
    group.add_argument(
        "--anp-alpha", type=number(float, 0, 1), default=0.2, metavar="X", help="weight of the natural loss, 0 to 1"
    )
    group.add_argument(
        "--anp-project",
        action="store_true",
        help="keep the perturbation inside the eps-ball, as the paper writes it; the published numbers "
        "come from letting it reach 2 * eps",
    )


def add_pruning_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sweep and the choice of the operating point of step 3."""
    group = parser.add_argument_group("pruning")
    group.add_argument("--mask-file", required=True, metavar="FILE", help="mask_values.txt of step 2")
    group.add_argument(
        "--pruning-by", choices=["threshold", "number"], default="threshold", help="what the sweep counts in"
    )
    group.add_argument(
        "--pruning-max",
        type=number(float, 0),
        metavar="X",
        help="last point of the sweep: a mask value, 0 to 1, or a number of neurons (default: 0.90, or all neurons)",
    )
    group.add_argument(
        "--pruning-step",
        type=number(float, 0, open_low=True),
        metavar="X",
        help="distance of two points, above 0 (default: 0.05, or 1/80 of the neurons)",
    )
    choice = group.add_mutually_exclusive_group()
    choice.add_argument(
        "--threshold",
        type=number(float, 0, 1),
        metavar="X",
        help="operating point: prune every neuron with mask <= X, 0 to 1 (default: the paper's 0.2)",
    )
    choice.add_argument(
        "--max-acc-drop",
        type=number(float, 0, 100),
        metavar="POINTS",
        help="operating point: the last of the sweep that costs at most this many percentage points of "
        "accuracy on the defender's clean images, 0 to 100",
    )
