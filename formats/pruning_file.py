"""``pruning_by_threshold.txt`` and ``pruning_by_number.txt``: a sweep in the release's text format, one row a line."""

from collections.abc import Iterable
from pathlib import Path

from engine.evaluation import Metrics, Report
from formats.mask_file import SEPARATOR
from models.neurons import Neuron
from utils.files import write_text

HEADER = ("No", "Layer Name", "Neuron Idx", "Mask", "PoisonLoss", "PoisonACC", "CleanLoss", "CleanACC")
UNKNOWN = Metrics(float("nan"), float("nan"))


def write_sweep(path: str | Path, rows: Iterable[tuple[int, Neuron | None, float | None, Report]]) -> None:
    """Write the rows of a sweep; accuracies are shares of 1, ``nan`` where there is no trigger.

    Args:
        path: the text file.
        rows: number of neurons pruned, the last of them, what the column ``Mask`` shows, and what was measured.

    Raises:
        OSError: the file cannot be written.
    """
    lines = [SEPARATOR.join(HEADER)]
    for count, last, mask, report in rows:
        layer, index = (last.layer, last.index) if last else (None, None)
        triggered = report.triggered or UNKNOWN
        figures = (triggered.loss, triggered.accuracy, report.clean.loss, report.clean.accuracy)
        lines.append(SEPARATOR.join(map(str, (count, layer, index, mask, *(f"{figure:.4f}" for figure in figures)))))
    write_text(path, "\n".join(lines) + "\n")
