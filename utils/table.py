"""One fixed-width table for people, and the same rows as JSON lines for programs."""

import json
from pathlib import Path
from typing import Any

from utils.console import announce
from utils.errors import InputError
from utils.files import read_text, write_text


class Table:
    """A table that prints its header once and every row as it comes, and keeps a JSON-lines file up to date.

    Args:
        path: the JSON-lines file; its first line is ``record``, then one object a row.
        record: what produced the rows: command, arguments, versions.
        columns: format of each column by name, e.g. ``{"epoch": "5d", "C-Acc %": "8.2f"}``.
        rows: rows of an interrupted run, printed again.
    """

    def __init__(self, path: Path, record: dict, columns: dict[str, str], rows: list[dict] | None = None):
        self.path, self.record, self.columns = path, record, columns
        self.rows: list[dict] = []
        self._widths = {
            name: max(len(name), int("".join(c for c in form.split(".")[0] if c.isdigit()) or 0))
            for name, form in columns.items()
        }
        announce("  ".join(name.rjust(width) for name, width in self._widths.items()))
        for row in rows or []:
            self._print(row)
            self.rows.append(row)

    def _print(self, row: dict[str, Any]) -> None:
        cells = (self._cell(row[name], form).rjust(self._widths[name]) for name, form in self.columns.items())
        announce("  ".join(cells))

    @staticmethod
    def _cell(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    def add(self, row: dict[str, Any]) -> None:
        """Print a row and write the file anew; raises ``OSError`` where it cannot be written."""
        self.rows.append(row)
        self._print(row)
        self.write()

    def write(self, ended: bool = False) -> None:
        """Write the JSON-lines file; ``ended`` marks the run as complete. Raises as ``add``."""
        write_log(self.path, self.record, self.rows, ended)


def write_log(path: Path, record: dict, rows: list[dict], ended: bool) -> None:
    """Write a JSON-lines file: the record, which says whether the run has ended, then the rows; raises ``OSError``."""
    lines = [{"record": {**record, "ended": ended}}, *rows]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_table(path: str | Path) -> tuple[dict, list[dict]]:
    """Read a JSON-lines file back: the record and the rows.

    Raises:
        InputError: the file is no log of a run.
    """
    text = read_text(path)
    try:
        first, *rows = map(json.loads, text.splitlines())
        return dict(first["record"]), rows
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not the log of a run; move it away or use --overwrite") from error
