"""The driver: which rows are logged, and that no interruption loses, repeats or changes one."""

import json
from argparse import Namespace

import pytest

import utils.run
from engine.drive import drive
from engine.evaluation import Metrics, Report
from utils.run import Run
from utils.signals import Interrupted

COLUMNS = {"always": "6d", "sum": "3d", "C-Acc %": "7.2f", "seconds": "8.0f"}
REPORT = Report(Metrics(0.5, 0.9), None, None)


class Adding:
    """Adds up the numbers of its steps; every row has the same first column."""

    title, unit = "adding", "step"
    columns = COLUMNS
    total = 6

    def __init__(self, fails_at=None):
        self.done, self.sum, self.fails_at = 0, 0, fails_at

    def steps(self):
        while self.done < self.total:
            if self.done + 1 == self.fails_at:
                raise RuntimeError("killed")
            self.done += 1
            self.sum += self.done
            yield self.done

    def due(self):
        return self.done % 2 == 0

    def row(self):
        row, self.sum = {"always": 1, "sum": self.sum}, 0
        return row

    def state_dict(self):
        return {"done": self.done, "sum": self.sum}

    def load_state_dict(self, state):
        self.done, self.sum = state["done"], state["sum"]


def carry(folder, loop, measure=lambda: None, handle=lambda row, report: None, resume=False):
    """Drive a loop as a script does; return what was yielded."""
    seen = []
    with Run("adding", Namespace(output_dir=str(folder), resume=resume, overwrite=False), "") as run:
        for row, report in drive(run, loop, measure):
            handle(row, report)
            seen.append(row["sum"])
        run.finish()
    return seen


def logged(folder):
    _, *rows = map(json.loads, (folder / "adding_log.jsonl").read_text().splitlines())
    return [row["sum"] for row in rows]


def nth(number, error):
    """Return a function that raises at its nth call."""
    calls = []

    def count(*_):
        calls.append(1)
        if len(calls) == number:
            raise error

    return count


def test_every_row_that_is_due_is_logged_and_yielded(tmp_path):
    assert carry(tmp_path, Adding()) == logged(tmp_path) == [0, 1 + 2, 3 + 4, 5 + 6]


def test_a_row_has_what_was_measured(tmp_path):
    rows = []
    carry(tmp_path, Adding(), lambda: REPORT, lambda row, report: rows.append((row["C-Acc %"], report)))
    assert rows == [(90, REPORT)] * 4
    rows.clear()
    carry(tmp_path, Adding(), handle=lambda row, report: rows.append((row["C-Acc %"], report)))
    assert rows == [(None, None)] * 4


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("place", ["measure", "handle"])
def test_a_row_that_was_interrupted_comes_again_and_is_logged_once(tmp_path, place, number):
    """In the first case it was not logged yet; in the second it was, but its checkpoint may not be written."""
    with pytest.raises(Interrupted):
        carry(tmp_path, Adding(), **{place: nth(number, Interrupted())})
    reports = []
    seen = carry(tmp_path, Adding(), lambda: REPORT, lambda row, report: reports.append(report), resume=True)
    assert logged(tmp_path) == [0, 3, 7, 11]
    assert len(seen) == 4 - (number - 1) and seen[1:] == [0, 3, 7, 11][number:]
    assert reports == [REPORT] * len(seen)


@pytest.mark.parametrize("step", [2, 3, 6])
def test_a_run_that_was_killed_goes_on_from_its_last_save(tmp_path, monkeypatch, step):
    monkeypatch.setattr(utils.run, "SAVE_SECONDS", -1.0)  # after every step
    with pytest.raises(RuntimeError, match="killed"):
        carry(tmp_path, Adding(fails_at=step))
    loop = Adding()
    seen = carry(tmp_path, loop, resume=True)
    assert logged(tmp_path) == [0, 3, 7, 11] and loop.done == 6
    assert seen[-1] == 11
