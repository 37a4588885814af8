"""The figure of README.md: docs/badnets_sweep.png and .pdf, made from a run whose sweep is on file as a whole.

Draw it anew:
    python -m benchmarks.figure
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.tables import FIGURES, FIXED, ROOT, chosen_row, load_results
from formats.plots import plot_sweep
from utils.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN = "badnets-full-width.json"


def log_row(run: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a result's sweep over thresholds by the names of the columns of step 3's log."""
    figures = {column: row.get(name) for name, column in FIGURES.items()}
    return {"mask": row["threshold"], "pruned %": 100 * row["pruned"] / run["neurons"], **figures}


def draw(path: Path, run: dict[str, Any]) -> "Figure":
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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the figure; it has no flags."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Draw the figure of the README; returns the exit status."""
    build_parser().parse_args(argv)
    try:
        (run,) = [result for result in load_results(root / "results") if result["file"] == RUN]
        draw(root / "docs" / "badnets_sweep.png", run)
    except (InputError, OSError) as error:
        print(f"figure: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
