"""The one loop that drives anything iterative: progress, rows that are due, snapshots, resume, signals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.evaluation import NotFinite, Report, Reports
from utils.config import Config, Range, setting
from utils.errors import InputError
from utils.run import Run, read_as_state

UNTRAINED_REMEDY = "look at --mean and --std, and at the checkpoint: nothing was trained here"


@dataclass(frozen=True)
class LogConfig(Config):
    """How often to look."""

    print_every: int = setting(500, "updates between two rows of the table", Range(1))


class Loop(Protocol):
    """What ``drive`` drives: a training, a mask optimisation, a sweep.

    Attributes:
        title, unit: of the progress bar.
        columns: of the log, with their formats.
        total: steps of the whole loop.
        done: steps made so far.
        remedy: what to do where the loss is not finite.
    """

    title: str
    unit: str
    columns: dict[str, str]
    total: int
    done: int
    remedy: str

    def steps(self) -> Iterator[object]:
        """Go on from where the loop stands to its end; its state moves on with every step."""

    def due(self) -> bool:
        """Say whether a row belongs here."""

    def row(self) -> dict[str, Any]:
        """Return what the steps since the last row saw, and begin to count anew."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that steps change, in tensors and plain containers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to what ``state_dict`` returned."""


class Means:
    """Means of what steps saw since the last row, summed on the device without waiting for it.

    Args:
        count: how many values a step has.
        device: where they are.
    """

    def __init__(self, count: int, device: torch.device):
        self.sums = torch.zeros(count, device=device, dtype=torch.float64)
        self.weight = 0

    def add(self, *values: Tensor, weight: int = 1) -> None:
        """Add one step's values, 0-dimensional each, which stand for ``weight`` samples."""
        self.sums += weight * torch.stack([value.detach().double() for value in values])
        self.weight += weight

    def take(self) -> list[float | None]:
        """Return the means and start again; None where there was no step."""
        means = (self.sums / self.weight).tolist() if self.weight else [None] * len(self.sums)
        self.sums.zero_()
        self.weight = 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return the sums so far."""
        return {"sums": self.sums, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to what ``state_dict`` returned; raises ``TypeError`` and others where this is none."""
        if type(state["weight"]) is not int:
            raise TypeError(f"a weight is {state['weight']!r}")
        self.sums.copy_(state["sums"])
        self.weight = state["weight"]


def drive(
    run: Run, loop: Loop, measure: Callable[[], Report | Reports | None]
) -> Iterator[tuple[dict[str, Any], Report | Reports | None]]:
    """Carry a loop to its end, or on from the run's saved state, and log its rows.

    Args:
        run: an entered run.
        loop: at its beginning.
        measure: what is known of the network where a row is due; None where there is nothing to measure.

    Yields:
        Each row and what was measured. The row at which a run was interrupted comes again when it is resumed, since
        what the caller does with it may not have happened.

    Raises:
        InputError: the network diverged, or the state to resume from is none of this loop.
        OSError: log or state cannot be written.
    """
    logged = None  # steps done at the last row
    if run.saved:
        with read_as_state(run.state_path):
            loop.load_state_dict(run.saved["loop"])
            logged = run.saved["logged"]
            if type(loop.done) is not int or not 0 <= loop.done <= loop.total:
                raise ValueError(f"{loop.done} of {loop.total} steps are done")
    run.clear()
    log = run.table(loop.columns)
    run.snapshot = lambda: {"loop": loop.state_dict(), "logged": logged}

    def rows():
        nonlocal logged
        if not loop.due():
            return
        report = measure()
        with run.uninterrupted():  # reset the sums and log the row together, or not at all
            row = {**dict.fromkeys(loop.columns), **loop.row(), **(report.row() if report else {})}
            row["seconds"] = run.seconds
            if logged != loop.done:
                log.add(row)
                logged = loop.done
        yield row, report

    try:
        yield from rows()
        for _ in run.track(loop.steps(), loop.total, loop.done, loop.title, loop.unit):
            yield from rows()
        run.save()  # before results appear, which would else be in the way of --resume after a power cut
    except NotFinite as error:
        raise InputError(f"{error}; {loop.remedy}") from error
