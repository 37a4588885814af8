"""The paper's figures, each from one command, as PNG and as PDF (docs/figures.md).

C-Acc and ASR against the threshold and the share of neurons pruned, mean and spread over runs: folders in which step 3
has ended, or files of results/; runs of one attack and network are taken together:
    python -m benchmarks.figures sweep save/seed-0 save/seed-1 save/seed-2 --output sweep.png

Wrong answers, and answers of the target class, while the neurons are perturbed (a minute a network on a CPU core):
    python -m benchmarks.figures perturbation --checkpoint badnets-0 --checkpoint benign-0 --output perturbation.png

The masks of several networks by layer, from the zoo or from files of step 2:
    python -m benchmarks.figures masks badnets-0 blend-0 --output masks.png

The figure of README.md, docs/badnets_sweep.png and .pdf:
    python -m benchmarks.figures readme
"""

import argparse
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.tables import FIGURES, FIXED, ROOT, TITLES, WIDTHS, chosen_row, finished_log, load_result, load_results
from data.datasets import DataConfig, SourceConfig
from defenses.defense import BATCH, CleanImages
from defenses.perturbation import Answers, PerturbationConfig, perturbed_answers
from defenses.pruning import PAPER_THRESHOLD
from engine.memory import check_step, masking_bytes
from engine.runtime import Runtime, RuntimeConfig, prepare_runtime
from formats.cards import read_card
from formats.mask_file import parse_masks
from formats.plots import NETWORKS, plot_perturbation, plot_several_masks, plot_sweep, plot_sweeps
from formats.subject import Subject, SubjectConfig, load_defender
from formats.zoo import ZooConfig, locate_inputs
from models import ModelConfig
from utils.config import Config, InputFile, Range, add_flags, from_flags, make_parser, not_empty, setting
from utils.console import announce
from utils.errors import InputError
from utils.guard import guard
from utils.run import versions
from utils.table import write_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

README_RUN = "badnets-full-width.json"
ROW = "{:<24} {:<12} {:>5}  {:>7} {:>15}  {:>8} {:>15}"

Row = dict[str, Any]
Sweep = tuple[list[Row], list[Row]]  # what is drawn against the threshold, and against the share of neurons


# Sweeps


def log_row(run: Row, row: Row) -> Row:
    """Return a row of a result's sweep by the names of the columns of step 3's log."""
    figures = {column: row.get(name) for name, column in FIGURES.items()}
    mask = row.get("threshold", row.get("mask"))
    return {"mask": mask, "pruned %": 100 * row["pruned"] / run["neurons"], **figures}


def read_sweep(path: Path) -> tuple[str, Sweep]:
    """Read the sweeps of a run, by threshold and by number, or one of them where the other is not there.

    Args:
        path: the output folder of step 3, or a result file.

    Returns:
        What the run is called in the figure, attack and network, and its rows.

    Raises:
        InputError: there is no sweep, or that of an unfinished run, or a file is none of this version.
    """
    try:
        return _sweep_of_result(load_result(path)) if path.suffix == ".json" else _sweep_of_folder(path)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its sweep or card is not of this version ({error!r})") from error


def _sweep_of_result(run: Row) -> tuple[str, Sweep]:
    if run["content"] != "run":
        raise InputError(f"{run['file']}: holds no run but content {run['content']!r}")
    if run.get("excerpt"):
        raise InputError(f"{run['file']}: only an excerpt of its sweep is on file; draw the folder of step 3")
    before = {"threshold": None, "pruned": 0, **run["before"]}
    sweeps = [run.get(f"by_{by}") for by in ("threshold", "number")]
    found = [[log_row(run, row) for row in (before, *rows)] for rows in sweeps if rows]
    return _caption(run["attack"], run), (found[0], found[-1])


def _sweep_of_folder(folder: Path) -> tuple[str, Sweep]:
    steps = [f"pruning_by_{by}" for by in ("threshold", "number")]
    found = [finished_log(folder, step)[1] for step in steps if (folder / f"{step}_log.jsonl").exists()]
    if not found:
        raise InputError(f"{folder}: no {steps[0]}_log.jsonl and no {steps[1]}_log.jsonl, which step 3 writes")
    names = ("mask", "pruned %", "C-Acc %", "ASR %")
    rows = [[{name: row[name] for name in names} for row in log] for log in found]
    card = read_card(folder / "repaired_model.th") or {}
    return _caption((card.get("attack") or {}).get("poison_type"), card), (rows[0], rows[-1])


def _caption(attack: str | None, card: Row) -> str:
    """Say in words what was attacked how."""
    arch, width = card.get("model") or card.get("arch"), card.get("widen_factor")
    size = WIDTHS.get(width, f"width {width:g}") if width else None
    return ", ".join(part for part in (TITLES.get(attack, attack) or "attack not known", arch, size) if part)


def draw_sweeps(args: argparse.Namespace) -> None:
    """Draw the sweeps of several runs; raises ``InputError`` as ``read_sweep``, or where runs share no threshold."""
    groups = defaultdict(list)
    for path in _once(args.runs):
        caption, sweep = read_sweep(Path(path))
        groups[caption].append(sweep)
    try:
        plot_sweeps(Path(args.output), groups)
    except ValueError as error:
        raise InputError(f"{error}; draw them apart") from error


def _once(names: list[str]) -> list[str]:
    """Return names of which none may be there twice, as it would be counted as two runs."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"{twice[0]}: named twice")
    return names


def draw_readme(path: Path, run: Row) -> "Figure":
    """Draw the sweep over thresholds of a result, as step 3 does, with the paper's threshold as operating point.

    Args:
        path: the PNG file; the PDF file lies beside it.
        run: a result whose sweep is no excerpt.

    Returns:
        The figure as it was written.

    Raises:
        InputError: the row of the paper's threshold is missing.
        OSError: the folder cannot be written or the disk is full.
    """
    rows = [{"threshold": None, "pruned": 0, **run["before"]}, *run["by_threshold"]]
    chosen = chosen_row(run, FIXED, "threshold")
    return plot_sweep(path, [log_row(run, row) for row in rows], "threshold", log_row(run, chosen))


# Perturbations


@dataclass(frozen=True)
class TargetConfig(Config):
    """Which class is counted."""

    target_class: int | None = setting(
        None, "class whose share of the answers is drawn (default: the target on a network's card)", Range(0, 1e6)
    )


@dataclass(frozen=True)
class Measured:
    """A network to be measured: what the defender sees, and the names of its classes."""

    subject: Subject
    classes: tuple[str, ...]

    @property
    def target(self) -> int | None:
        """The target class on its card, None where there is none."""
        target = (self.subject.card.get("attack") or {}).get("poison_target")
        return target if isinstance(target, int) else None


def _load(args: argparse.Namespace, runtime: Runtime) -> dict[str, Measured]:
    """Load the networks that a command line names, before any is measured."""
    networks = {}
    for name in _once(args.checkpoint):
        own = argparse.Namespace(**{**vars(args), "checkpoint": name})
        locate_inputs(own)
        subject, loaded = load_defender(own, runtime)
        batch = min(BATCH, len(subject.clean))
        check_step(masking_bytes, subject.network, batch, runtime, subject.clean)
        networks[name] = Measured(subject, tuple(map(str, loaded.dataset.classes)))
    return networks


def _targets(networks: dict[str, Measured], given: int | None) -> dict[str, int]:
    """Return the class to count for each network: the one given, else its own, else that of another network.

    Raises:
        InputError: none is known or there is no such class, or the networks have not the same classes.
    """
    known = [each.target for each in networks.values() if each.target is not None]
    if given is None and not known:
        raise InputError("no card names a target class; say which class to count with --target-class")
    found = {}
    for name, each in networks.items():
        if each.classes != next(iter(networks.values())).classes:
            raise InputError(f"{name}: has other classes than the network before it; draw them apart")
        found[name] = next(value for value in (given, each.target, *known) if value is not None)
        if found[name] >= len(each.classes):
            raise InputError(f"--target-class {found[name]}: there are {len(each.classes)} classes, counted from 0")
    return found


def _row(answers: Answers, target: int) -> Row:
    shares = [100 * share for share in answers.shares]
    error, counted = 100 * answers.error, shares[target]
    row = {"kind": answers.kind, "eps": answers.eps, "draw": answers.draw}
    return {**row, "error %": error, "target %": counted, "shares %": shares}


def _print_rows(name: str, rows: list[Row]) -> None:
    """Print mean and spread over the draws of one network, a line for each kind and eps."""
    for kind, eps in dict.fromkeys((row["kind"], row["eps"]) for row in rows):
        draws = [row for row in rows if (row["kind"], row["eps"]) == (kind, eps)]
        cells = []
        for column in ("error %", "target %"):
            values = [row[column] for row in draws]
            cells += [f"{fmean(values):.1f}", f"{min(values):.1f} to {max(values):.1f}"]
        announce(ROW.format(name, kind, f"{eps:g}", *cells))


def draw_perturbation(args: argparse.Namespace, command: str) -> None:
    """Measure networks under perturbations, print, draw, and write the rows beside the figure."""
    runtime = prepare_runtime(from_flags(RuntimeConfig, args))
    announce(f"computing on {runtime}")
    if len(args.checkpoint) > len(NETWORKS):
        raise InputError(f"{len(args.checkpoint)} networks; more than {len(NETWORKS)} lines cannot be told apart")
    networks = _load(args, runtime)
    targets = _targets(networks, args.target_class)
    config = from_flags(PerturbationConfig, args, precision=runtime.precision)
    announce(ROW.format("network", "kind", "eps", "error %", "draws", "target %", "draws"))
    drawn: dict[str, list[Row]] = {}
    for name, each in networks.items():
        clean = CleanImages.of(each.subject)
        drawn[name] = [
            _row(answers, targets[name]) for answers in perturbed_answers(each.subject.network, clean, config)
        ]
        _print_rows(name, drawn[name])
    classes = next(iter(networks.values())).classes
    counted = {classes[target] for target in targets.values()}
    record = {"command": command, "runtime": runtime.facts(), "versions": versions(), "targets": targets}
    rows = [{"network": name, **row} for name, rows in drawn.items() for row in rows]
    path = Path(args.output)
    write_log(path.with_suffix(".jsonl"), record, rows, ended=True)
    plot_perturbation(path, drawn, counted.pop() if len(counted) == 1 else "its target class", len(classes))


# Masks


def draw_masks(args: argparse.Namespace) -> None:
    """Draw the masks of several networks; raises ``InputError`` as ``parse_masks``."""
    networks = {}
    for name in _once(args.mask_files):
        own = argparse.Namespace(**{**vars(args), "mask_file": name})
        locate_inputs(own)
        networks[name] = parse_masks(own.mask_file)
    plot_several_masks(Path(args.output), networks, PAPER_THRESHOLD)


# The command line


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the figures."""
    parser = make_parser(__doc__)
    figures = parser.add_subparsers(dest="figure", required=True, metavar="FIGURE")
    sweep = figures.add_parser("sweep", help="C-Acc and ASR against threshold and share pruned, over several runs")
    sweep.add_argument("runs", nargs="+", metavar="RUN", help="output folder of step 3, or a file of results/")
    perturbation = figures.add_parser("perturbation", help="answers of networks whose neurons are perturbed")
    perturbation.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        type=not_empty(InputFile),
        metavar="FILE",
        help=f"a network: a file, an address, or a name from the zoo; may be repeated, up to {len(NETWORKS)} times",
    )
    for config in (PerturbationConfig, TargetConfig, SubjectConfig, SourceConfig, RuntimeConfig):
        add_flags(perturbation, config)
    add_flags(perturbation, ModelConfig, card=True)
    add_flags(perturbation, DataConfig, card=True)
    masks = figures.add_parser("masks", help="masks by layer of several networks")
    masks.add_argument(
        "mask_files", nargs="+", metavar="MASKS", help="mask_values.txt of step 2: a file or a name from the zoo"
    )
    for figure in (perturbation, masks):
        add_flags(figure, ZooConfig)
    for figure in (sweep, perturbation, masks):
        figure.add_argument(
            "--output", required=True, type=not_empty(str), metavar="FILE", help="the PNG file; a PDF lies beside it"
        )
        figure.add_argument("--overwrite", action="store_true", help="replace a figure that is there")
    figures.add_parser("readme", help="docs/badnets_sweep.png, from results/")
    return parser


def check_output(args: argparse.Namespace) -> None:
    """Make sure that the figure can be written, before minutes are spent on it.

    Raises:
        InputError: its name ends in anything but .png, it is there already, or its folder is not.
    """
    path = Path(args.output)
    if path.suffix != ".png":
        raise InputError(f"{path}: the name of a figure ends in .png; the PDF is written beside it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it, or choose another name for --output")
    written = [".png", ".pdf", *([".jsonl"] if args.figure == "perturbation" else [])]
    there = [found for found in map(path.with_suffix, written) if found.exists()]
    if there and not args.overwrite:
        raise InputError(f"{there[0]} is there already; choose another name for --output, or --overwrite")


def draw(args: argparse.Namespace, command: str, root: Path) -> None:
    """Draw the figure that a command line asks for; raises ``InputError`` or ``OSError``."""
    if args.figure == "readme":
        (run,) = [result for result in load_results(root / "results") if result["file"] == README_RUN]
        draw_readme(root / "docs" / "badnets_sweep.png", run)
        return
    check_output(args)
    figures: dict[str, Callable] = {
        "sweep": draw_sweeps,
        "perturbation": partial(draw_perturbation, command=command),
        "masks": draw_masks,
    }
    figures[args.figure](args)
    announce(f"saved {args.output}")


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Draw a figure; returns the exit status."""
    args = build_parser().parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "benchmarks.figures", *words])
    return guard(partial(draw, args, command, root), "figures")


if __name__ == "__main__":
    sys.exit(main())
