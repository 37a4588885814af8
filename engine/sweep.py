"""Measure a network, pruned more and more."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from engine.drive import UNTRAINED_REMEDY
from engine.evaluation import Report, percent
from models.neurons import Neuron, PruningPoint, prune_neurons, pruned_copy

COLUMNS = {
    "pruned": "6d",
    "pruned %": "6.2f",
    "threshold": "6.4f",
    "defender acc %": "7.2f",
    "clean loss": "8.4f",
    "C-Acc %": "7.2f",
    "ASR %": "7.2f",
}


@dataclass(frozen=True)
class SweepRow:
    """A point of the sweep and what the pruned network measured there."""

    point: PruningPoint
    report: Report


class SweepLoop:
    """Evaluates the untouched network, then the network pruned at every point; see ``engine.drive.Loop``.

    Points that prune no further neuron repeat the row before without evaluating again.

    Args:
        network: the untouched network; it is not changed.
        neurons: sorted by mask.
        points: the plan, with rising counts.
        evaluate: measures a network; called on a copy in eval mode.

    Attributes:
        rows: what was measured so far.

    Raises:
        ValueError: a neuron is not in the network.
    """

    title, unit = "sweep", "row"
    remedy = UNTRAINED_REMEDY

    def __init__(
        self,
        network: nn.Module,
        neurons: list[Neuron],
        points: Iterable[PruningPoint],
        evaluate: Callable[[nn.Module], Report],
    ):
        self.network, self.neurons, self.evaluate = network, neurons, evaluate
        self.points = [PruningPoint(0, None, None), *points]
        self.rows: list[SweepRow] = []
        by_number = len(self.points) > 1 and self.points[1].threshold is None
        self.columns = {name.replace("threshold", "mask") if by_number else name: f for name, f in COLUMNS.items()}
        self.total = len(self.points)

    @property
    def done(self) -> int:
        """Points measured so far."""
        return len(self.rows)

    def steps(self) -> Iterator[SweepRow]:
        """Measure the points that are left."""
        pruned, count = copy.deepcopy(self.network).eval(), 0
        for point in self.points[self.done :]:
            report = self.rows[-1].report if self.rows and self.rows[-1].point.count == point.count else None
            if report is None:
                prune_neurons(pruned, self.neurons[count : point.count])
                count, report = point.count, self.evaluate(pruned)
            self.rows.append(SweepRow(point, report))
            yield self.rows[-1]

    def due(self) -> bool:
        """A row belongs after every point."""
        return self.done > 0

    def row(self) -> dict[str, Any]:
        """Return what the last point prunes."""
        return self.describe(self.rows[-1].point)

    def report_of(self, point: PruningPoint) -> Report:
        """Return what a point of the sweep measured, or measure it now if it is none."""
        known = [row.report for row in self.rows if row.point.count == point.count]
        return known[0] if known else self.evaluate(pruned_copy(self.network, self.neurons[: point.count]))

    def describe(self, point: PruningPoint) -> dict[str, Any]:
        """Return what a point prunes, by the names of the log's columns and more."""
        return {
            "pruned": point.count,
            "pruned %": percent(point.count / len(self.neurons)),
            "threshold": point.threshold,
            "layer": point.last and point.last.layer,
            "neuron": point.last and point.last.index,
            "mask": point.mask,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured so far."""
        return {"reports": [row.report.state_dict() for row in self.rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after what was measured before."""
        reports = map(Report.from_state_dict, state["reports"])
        self.rows = [SweepRow(point, report) for point, report in zip(self.points, reports, strict=False)]
