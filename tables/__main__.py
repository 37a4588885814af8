"""Make a table: run the cells that are not done yet, on Snakemake, and render what is there.

On this machine, with all its cores:
    python -m tables tables/main.yaml

On a cluster, or with any other option of Snakemake after the two dashes (docs/tables.md):
    python -m tables tables/main.yaml -- --executor slurm --jobs 50

Writes to save/tables/NAME/: table.md, table.csv, table.tex, table.png and .pdf, plan.json, which has every command, and
missing.md while cells are missing.
"""

import argparse
import importlib.util
import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path

from utils.config import Range, make_parser, not_empty, number
from utils.console import announce, leave, prepare_process
from utils.errors import InputError
from utils.files import write_bytes
from utils.guard import guard

ROOT = Path(__file__).parents[1]
OUTPUT = Path("save", "tables")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tables."""
    parser = make_parser(__doc__)
    parser.prog = "python -m tables"
    parser.add_argument("table", type=not_empty(str), metavar="TABLE", help="the table file, such as tables/main.yaml")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands that are not done yet")
    parser.add_argument("--render", action="store_true", help="run nothing, render what is there")
    parser.add_argument("--cores", type=number(int, Range(1)), metavar="N", help="cells at once (default: all cores)")
    parser.add_argument(
        "--gpus", type=number(int, Range(0)), default=0, metavar="N", help="each cell takes one of N GPUs (default: 0)"
    )
    parser.add_argument(
        "--output-dir", type=not_empty(str), metavar="DIR", help=f"folder of the table (default: {OUTPUT}/NAME)"
    )
    parser.add_argument(
        "--cells-dir", type=not_empty(str), metavar="DIR", help=f"folder of all cells (default: {OUTPUT}/cells)"
    )
    return parser


def check_installed(*names: str) -> None:
    """Raise ``InputError`` where a package is missing that tables need and the rest of the project does not."""
    missing = [name for name in names if not importlib.util.find_spec(name)]
    if missing:
        raise InputError(f"{missing[0]} is not installed; pip install -r requirements-tables.txt, or make table")


def snakemake(plan: Path, args: argparse.Namespace, others: list[str]) -> list[str]:
    """Return the command that runs a plan; ``others`` are options of Snakemake."""
    says_jobs = any(re.match(r"--jobs(=|$)|-j", each) for each in others)
    cores = [] if says_jobs else ["--cores", str(args.cores or "all")]
    gpus = ["--resources", f"gpu={args.gpus}"] if args.gpus else []
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "tables" / "Snakefile")),
        *("--config", f"plan={plan}", f"gpu={int(args.gpus > 0)}", *gpus, *cores),
        *("--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime"),
        *("--nolock", "--quiet", "rules"),  # a cell's folder locks itself; a killed Snakemake would leave its lock
        *others,
    ]


def work(args: argparse.Namespace, others: list[str]) -> None:
    """Plan, and run or render; where it runs, this process becomes Snakemake."""
    check_installed("yaml")
    from tables.cells import CELLS, DONE
    from tables.plan import make_plan
    from tables.render import render

    path = Path(args.table)
    plan = make_plan(path, Path(args.cells_dir or CELLS))
    todo = [cell for cell in plan.cells.values() if not Path(plan.folder, cell.name, DONE).exists()]
    if args.dry_run:
        for cell in todo:
            announce(shlex.join(cell.command))
        announce(f"{len(todo)} of {len(plan.cells)} cells are not done yet")
        return
    ends_here = args.render or not todo
    check_installed("pandas", "jinja2", *([] if ends_here else ["snakemake"]))
    output = Path(args.output_dir or OUTPUT / path.stem)
    output.mkdir(parents=True, exist_ok=True)
    write_bytes(output / "plan.json", plan.as_json())
    if ends_here:
        render(output / "plan.json")
        return
    announce(f"{len(todo)} of {len(plan.cells)} cells are to be done")
    command = snakemake(output / "plan.json", args, others)
    os.execv(command[0], command)


def main(argv: list[str] | None = None) -> int:
    """Make a table; returns the exit status."""
    given = sys.argv[1:] if argv is None else argv
    place = given.index("--") if "--" in given else len(given)
    args = build_parser().parse_args(given[:place])
    return guard(partial(work, args, given[place + 1 :]), "tables")


if __name__ == "__main__":
    prepare_process()
    leave(main())
