"""``pruning_by_threshold.txt`` and ``pruning_by_number.txt``: a sweep in the release's text format, one row a line."""

from pathlib import Path

from defenses.pruning import SweepRow
from utils.evaluation import Metrics, Report
from utils.files import write_text
from utils.mask_file import SEPARATOR

HEADER = ("No", "Layer Name", "Neuron Idx", "Mask", "PoisonLoss", "PoisonACC", "CleanLoss", "CleanACC")
UNKNOWN = Metrics(float("nan"), float("nan"))


def write_sweep(path: str | Path, rows: list[SweepRow[Report]]) -> None:
    """Write the rows of a sweep; accuracies are shares of 1, ``nan`` where there is no trigger.

    Raises:
        OSError: the file cannot be written.
    """
    lines = [SEPARATOR.join(HEADER)]
    for (count, last, value), report in ((row.point, row.metrics) for row in rows):
        layer, index = (last.layer, last.index) if last else (None, None)
        triggered = report.triggered or UNKNOWN
        figures = (triggered.loss, triggered.accuracy, report.clean.loss, report.clean.accuracy)
        lines.append(SEPARATOR.join(map(str, (count, layer, index, value, *(f"{figure:.4f}" for figure in figures)))))
    write_text(path, "\n".join(lines) + "\n")
