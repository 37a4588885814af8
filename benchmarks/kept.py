"""Result files of single networks: kept one by one, read all together, shown as tables."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.errors import InputError
from utils.files import as_json, read_json, write_bytes

Result = dict[str, Any]
Tables = dict[str, Callable[[dict[str, Result]], str]]  # each renders results by network


def read_kept(folder: Path, entries: set[str]) -> dict[str, Result]:
    """Return the results of a folder by network.

    Raises:
        InputError: a file is no JSON, or lacks one of the entries.
    """
    results = {}
    for path in sorted(folder.glob("*.json")):
        results[path.stem] = read_json(path)
        if lacking := entries - results[path.stem].keys():
            raise InputError(f"{path}: no result, it lacks {', '.join(sorted(lacking))}; collect it anew")
    return results


def keeping_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of a script that collects results and prints their tables."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="keep what a run found")
    collecting.add_argument("folder", type=Path, help="of the run")
    collecting.add_argument("output", type=Path, help="the result file")
    commands.add_parser("table", help="print the tables")
    return parser


def keep_or_show(
    args: argparse.Namespace, collect: Callable[[Path], Result], load: Callable[[], dict[str, Result]], tables: Tables
) -> int:
    """Carry out what was asked of such a script; returns the exit status."""
    try:
        if args.command == "collect":
            content = as_json(collect(args.folder))
            args.output.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(args.output, content)
        else:
            results = load()
            print(*(table(results) for table in tables.values()), sep="\n")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
