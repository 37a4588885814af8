"""What not knowing the trigger costs: step 3 with --trigger-free against the choices of somebody who knows more.

Keep what a run of step 3 with --trigger-free found out about a network:
    python -m benchmarks.trigger_free collect ./save/trigger_free/sig-1 results/trigger_free/sig-1.json

Print the tables of docs/trigger_free.md:
    python -m benchmarks.trigger_free table
"""

import argparse
import sys
from pathlib import Path
from statistics import fmean

from benchmarks.detection import IN_VIEW, UNSEEN, ZOO_GROUP, by_group, suspected
from benchmarks.kept import Result, Tables, keep_or_show, keeping_parser, read_kept
from benchmarks.tables import ROOT, finished_log, markdown
from defenses.pruning import PAPER_THRESHOLD, largest_within_drop
from utils.errors import InputError
from utils.files import read_json

RESULTS = ROOT / "results" / "trigger_free"
TOLERANCE, ABOVE_BEST = 5.0, 1.0  # percent; an ASR that is low enough: up to the larger of 5 and 1 above the least
COLUMNS = {
    "pruned": "pruned",
    "threshold": "threshold",
    "defender": "defender acc %",
    "C-Acc": "C-Acc %",
    "ASR": "ASR %",
}
BUDGETS = (1, 2, 3)  # points of the defender's accuracy


def collect(folder: Path) -> Result:
    """Return what step 3 wrote to a folder.

    Raises:
        InputError: a file is missing or damaged, or the run has not ended.
    """
    _, rows = finished_log(folder, "pruning_by_threshold")
    sweep = [{name: row[column] for name, column in COLUMNS.items()} for row in rows]
    if any(row["ASR"] is None for row in sweep) or all(row["threshold"] != PAPER_THRESHOLD for row in sweep):
        raise InputError(f"{folder}: expected a sweep past threshold {PAPER_THRESHOLD}, and an ASR in every row")
    card = read_json(folder / "repaired_model.json")
    if lacking := {"metrics", "repair", "attack"} - card.keys():
        raise InputError(f"{folder / 'repaired_model.json'}: no card of step 3, it lacks {', '.join(sorted(lacking))}")
    metrics = {"C-Acc": card["metrics"]["clean_accuracy"], "ASR": card["metrics"].get("attack_success_rate")}
    after = {"pruned": card["repair"]["pruned_neurons"], **metrics}
    return {**read_json(folder / "trigger_free.json"), "sweep": sweep, "after": after, "attack": card["attack"]}


def tolerated(result: Result) -> float:
    """Return up to which ASR, in percent, a network counts as repaired."""
    return max(TOLERANCE, ABOVE_BEST + min(row["ASR"] for row in result["sweep"]))


def oracle(result: Result) -> Result:
    """Return the row that somebody chooses who knows the test ASR: the highest C-Acc of those low enough."""
    rows = [row for row in (*result["sweep"], result["after"]) if row["ASR"] <= tolerated(result)]
    return max(rows, key=lambda row: row["C-Acc"])


def choices(result: Result) -> dict[str, Result]:
    """Return what was chosen without the test ASR, by rule."""
    sweep = result["sweep"]
    accuracies = [row["defender"] / 100 for row in sweep]
    fixed = next(row for row in sweep if row["threshold"] == PAPER_THRESHOLD)
    budgets = {f"{drop} points": sweep[largest_within_drop(accuracies, drop / 100)] for drop in BUDGETS}
    return {"without trigger": result["after"], "threshold 0.2": fixed, **budgets}


def _pair(row: Result) -> str:
    return f"{row['C-Acc']:.2f} / {row['ASR']:.2f}"


def _judged(row: Result, result: Result) -> str:
    """Return C-Acc / ASR, marked where the ASR is too high."""
    return _pair(row) + ("" if row["ASR"] <= tolerated(result) else " *")


def repairs_table(results: dict[str, Result]) -> str:
    """One row for each network."""
    rows = []
    for name, result in results.items():
        stop, found = result["stop"], result["detection"]
        said = suspected(found) or "none"
        abstained = " (abstained)" if stop and stop["abstained"] else ""
        cells = [_judged(row, result) for row in choices(result).values()]
        rows.append([f"`{name}`", said + abstained, _pair(result["sweep"][0]), *cells, _pair(oracle(result))])
    rules = ["without trigger", f"threshold {PAPER_THRESHOLD:g}", *(f"{drop} points" for drop in BUDGETS)]
    return markdown(["network", "suspected", "before", *rules, "knows the ASR"], rows)


def summary_table(results: dict[str, Result]) -> str:
    """For each rule: how often the ASR stays too high, how high, and what not knowing it costs where it does not."""
    groups, rows = by_group(results), []
    for title in (UNSEEN, ZOO_GROUP, IN_VIEW):
        members = list(groups[title].values())
        for rule in choices(members[0]) if members else ():
            chosen = [(choices(result)[rule], result) for result in members]
            costs = [oracle(each)["C-Acc"] - row["C-Acc"] for row, each in chosen if row["ASR"] <= tolerated(each)]
            left = [row["ASR"] for row, result in chosen if row["ASR"] > tolerated(result)]
            rows.append([title, rule, f"{len(left)} of {len(chosen)}", _mean_and_most(left), _mean_and_most(costs)])
    lost = "C-Acc lost against knowing it, where it is not: mean (most)"
    return markdown(["networks", "choice", "ASR too high", "ASR left there: mean (most)", lost], rows)


def _mean_and_most(values: list[float]) -> str:
    return f"{fmean(values):.2f} ({max(values):.2f})" if values else "-"


TABLES: Tables = {"repairs": repairs_table, "summary": summary_table}


def load(folder: Path = RESULTS) -> dict[str, Result]:
    """Return the results on file by network; raises ``InputError`` for a damaged file."""
    return read_kept(folder, {"detection", "stop", "sweep", "after", "attack"})


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    return keeping_parser(__doc__)


def main(argv: list[str] | None = None) -> int:
    """Collect or print; returns the exit status."""
    return keep_or_show(build_parser().parse_args(argv), collect, load, TABLES)


if __name__ == "__main__":
    sys.exit(main())
