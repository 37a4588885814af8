"""Collect what the cells of a plan measured, and write the table as Markdown, CSV, LaTeX and a figure.

Whatever is there is shown; what is missing is a dash, and listed in missing.md:
    python -m tables.render save/tables/main/plan.json
"""

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.tables import TITLES, markdown
from formats.plots import plot_table
from tables.cells import DONE, LOG, RESULTS
from tables.published import BEFORE, base, published_tables, rows_beside
from utils.config import make_parser
from utils.console import announce
from utils.errors import InputError, shorten
from utils.files import read_json, write_text
from utils.guard import guard
from utils.table import read_table

FIGURES = {"clean_accuracy": "C-Acc", "attack_success_rate": "ASR"}
MISSING = "missing.md"  # beside the table
TIMED = {"masks": "optimize_log.jsonl", "defend": "defend_log.jsonl"}  # pruning takes no time, its sweep measures


@dataclass(frozen=True)
class Group:
    """What the runs of one attack and one row measured.

    Attributes:
        runs: how many are done; None where whoever published the figures does not say.
        planned: how many there are to be; None for published figures.
        values: by figure, one of each run that is done; percent, or seconds.
        changes: by figure, of each of them the difference to its own network before the defence, if that is known.
    """

    runs: int | None
    planned: int | None
    values: dict[str, list[float]]
    changes: dict[str, list[float]]

    def mean(self, figure: str) -> float | None:
        """Return the mean; None where nothing is known."""
        known = self.values.get(figure)
        return statistics.fmean(known) if known else None

    def deviation(self, figure: str) -> float | None:
        """Return the standard deviation of the sample (ddof = 1); None of less than two runs."""
        known = self.values.get(figure, [])
        return statistics.stdev(known) if len(known) > 1 else None


@dataclass(frozen=True)
class Line:
    """A row of figures, measured here or published.

    Attributes:
        title: of the defence.
        setting: the sweep's value.
        source: who reports it; empty for our own.
        groups: by attack.
    """

    title: str
    setting: str
    source: str
    groups: dict[str, Group]


# Collecting


def measured_lines(plan: dict[str, Any]) -> list[Line]:
    """Read what the cells measured; raises ``InputError`` where a result is damaged."""
    before = {row["setting"]: row["runs"] for row in plan["rows"] if row["defense"] == BEFORE}
    lines = []
    for row in plan["rows"]:
        known = {} if row["defense"] == BEFORE else before.get(row["setting"]) or before.get("", {})
        groups = {attack: _group(plan, runs, known.get(attack, [])) for attack, runs in row["runs"].items()}
        lines.append(Line(row["defense"], row["setting"], "", groups))
    return lines


def _group(plan: dict[str, Any], runs: list[list[str]], before: list[list[str]]) -> Group:
    """Return what runs measured, and how it differs from what those of the networks ``before`` did."""
    old = {_network(plan, run): _figures(plan, run) for run in _done(plan, before)}
    done = _done(plan, runs)
    return _grouped(len(done), len(runs), [(old.get(_network(plan, run), {}), _figures(plan, run)) for run in done])


def _grouped(runs: int | None, planned: int | None, pairs: list[tuple[dict[str, float], dict[str, float]]]) -> Group:
    """Return the group of some figures, each with those before the defence."""
    values: dict[str, list[float]] = {}
    changes: dict[str, list[float]] = {}
    for old, new in pairs:
        for name, value in new.items():
            values.setdefault(name, []).append(value)
            if name in old:
                changes.setdefault(name, []).append(value - old[name])
    return Group(runs, planned, values, changes)


def _done(plan: dict[str, Any], runs: list[list[str]]) -> list[list[str]]:
    return [run for run in runs if Path(plan["folder"], run[-1], DONE).exists()]


def _network(plan: dict[str, Any], run: list[str]) -> tuple[str, ...]:
    """Return what a run begins with: the words for the network and its trigger in its first command."""
    words = plan["cells"][run[0]]["command"]
    return tuple(words[words.index(flag) + 1] for flag in ("--checkpoint", "--trigger-info") if flag in words)


def _figures(plan: dict[str, Any], run: list[str]) -> dict[str, float]:
    """Return what a run measured last, and the seconds of its defences as far as they are known of all."""
    kinds = {name: plan["cells"][name]["kind"] for name in run}
    path = Path(plan["folder"], run[-1], RESULTS[kinds[run[-1]]])
    metrics = read_json(path).get("metrics")
    if not isinstance(metrics, dict) or not all(isinstance(value, (int, float)) for value in metrics.values()):
        raise InputError(f"{path}: no metrics; remove its folder, and the cell is done anew")
    seconds = [_seconds(Path(plan["folder"], name), kind) for name, kind in kinds.items() if kind in TIMED]
    known = len(seconds) == sum(kind in ("prune", "defend") for kind in kinds.values()) and None not in seconds
    return {**metrics, **({"seconds": sum(seconds)} if known and seconds else {})}


def _seconds(folder: Path, kind: str) -> float | None:
    """Return how long a step took from loading to its result, as the last row of its log says."""
    _, rows = read_table(folder / TIMED[kind])
    return rows[-1].get("seconds") if rows else None


def _devices(plan: dict[str, Any]) -> set[str]:
    """Return the devices of the cells that are timed, as far as they are done."""
    logs = [Path(plan["folder"], name, TIMED.get(cell["kind"], "")) for name, cell in plan["cells"].items()]
    records = [read_table(log)[0] for log in logs if log.is_file() and log.with_name(DONE).exists()]
    return {record.get("runtime", {}).get("device", "an unknown device") for record in records}


def published_lines(plan: dict[str, Any], tables: dict[str, dict[str, Any]]) -> list[Line]:
    """Return a line for each defence of the tables that the plan names, of the plan's attacks and defences alone."""
    lines = []
    titles = [row["defense"] for row in plan["rows"]]
    for name in plan["published"]:
        rows = rows_beside(tables[name], titles, plan["attacks"])
        known = {(row["defense"], row["attack"]): {figure: row[figure] for figure in FIGURES} for row in rows}
        for defense in dict.fromkeys(row["defense"] for row in rows):
            groups = {}
            for attack in (row["attack"] for row in rows if row["defense"] == defense):
                old = {} if defense == BEFORE else known.get((BEFORE, attack), {})
                groups[attack] = _grouped(tables[name].get("runs"), None, [(old, known[defense, attack])])
            lines.append(Line(defense, "", tables[name]["cite"], groups))
    return lines


def side_by_side(ours: list[Line], published: list[Line]) -> list[Line]:
    """Put published lines behind our last one of the same defence."""
    lines = []
    for number, line in enumerate(ours):
        lines.append(line)
        if base(line.title) not in {base(each.title) for each in ours[number + 1 :]}:
            lines += [each for each in published if each.title == base(line.title)]
    return lines


def mean_change(line: Line) -> tuple[dict[str, float], int]:
    """Return the mean over attacks of the mean changes of a line's runs, in points, and over how many attacks."""
    changes = [
        {figure: statistics.fmean(group.changes[figure]) for figure in FIGURES if figure in group.changes}
        for group in line.groups.values()
    ]
    means = {figure: [change[figure] for change in changes if figure in change] for figure in FIGURES}
    return {figure: statistics.fmean(values) for figure, values in means.items() if values}, sum(map(bool, changes))


# Writing


def _shown(group: Group | None) -> str:
    """Return ``C-Acc ± deviation / ASR ± deviation (runs)``."""
    if group is None or not group.values:
        return "-"
    parts = []
    for figure in FIGURES:
        mean, deviation = group.mean(figure), group.deviation(figure)
        spread = "" if deviation is None else f" ± {deviation:.2f}"
        parts.append("-" if mean is None else f"{mean:.2f}{spread}")
    if group.runs is None:
        return " / ".join(parts)
    count = f"{group.runs} of {group.planned}" if group.planned and group.runs < group.planned else group.runs
    return f"{' / '.join(parts)} ({count})"


def _shown_change(line: Line, total: int) -> str:
    changes, count = mean_change(line)
    if not changes:
        return "-"
    text = " / ".join(f"{changes[figure]:+.2f}" if figure in changes else "-" for figure in FIGURES)
    return text if count == total else f"{text} ({count} of {total})"


def _title(line: Line) -> str:
    return f"{line.title}, as reported by {line.source}" if line.source else line.title


def table_of(plan: dict[str, Any], lines: list[Line]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows as text."""
    sweep = [plan["sweep"]] if plan["sweep"] else []
    seconds = ["seconds"] if plan["seconds"] else []
    header = ["defence", *sweep, *(TITLES.get(each, each) for each in plan["attacks"]), "mean change", *seconds]
    rows = []
    for line in lines:
        cells = [_shown(line.groups.get(attack)) for attack in plan["attacks"]]
        times = [group.mean("seconds") for group in line.groups.values()]
        known = [time for time in times if time is not None]
        time = [f"{statistics.fmean(known):.0f}" if known else "-"] if seconds else []
        setting = [line.setting or "-"] if sweep else []
        rows.append([_title(line), *setting, *cells, _shown_change(line, len(plan["attacks"])), *time])
    return header, rows


def records_of(lines: list[Line]) -> list[dict[str, Any]]:
    """Return one record for each attack of each line, for the CSV file."""
    records = []
    for line in lines:
        for attack, group in line.groups.items():
            record = {
                "defence": line.title,
                "setting": line.setting,
                "attack": attack,
                "source": line.source or "measured",
            }
            record |= {"runs": group.runs, "planned": group.planned}
            for figure in (*FIGURES, "robust_accuracy", "seconds"):
                record |= {f"{figure}_mean": group.mean(figure), f"{figure}_std": group.deviation(figure)}
            records.append(record)
    return records


def missing_cells(plan: dict[str, Any]) -> dict[str, str]:
    """Return by name what has become of the cells that are not done: the last line of the log of those that began."""
    missing = {}
    for name in plan["cells"]:
        folder = Path(plan["folder"], name)
        if not (folder / DONE).exists():
            log = folder / LOG
            lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
            said = shorten(lines[-1]) if len(lines) > 1 else "it has said nothing yet"  # above its output, the date
            missing[name] = f"not finished: {said} ({log})" if lines else "not begun"
    return missing


def notes(plan: dict[str, Any], tables: dict[str, dict[str, Any]], missing: dict[str, str]) -> Iterable[str]:
    """Yield the paragraphs below a table: what its figures mean, where others come from, and what is missing."""
    yield (
        "C-Acc / ASR on the test set in percent: mean ± standard deviation of the sample (ddof = 1) over the runs, "
        "whose number stands in brackets; of a single run there is no deviation. The mean change is that from the row "
        f"`{BEFORE}`, in points, over the attacks; each run counts against its own network."
    )
    if plan["seconds"]:
        devices = " and ".join("one CPU thread" if name == "cpu" else name for name in sorted(_devices(plan)))
        yield (
            "Seconds count the loading, the defence, and the measurements on the test set on its way; for ANP those of "
            f"the masks, without the sweep.{devices and f' Measured on {devices}.'}"
        )
    for name in plan["published"]:
        yield f"As reported by {tables[name]['cite']}: {tables[name]['setting_in_words']}."
    if missing:
        yield f"{len(missing)} of {len(plan['cells'])} cells are missing: {MISSING}"


@contextmanager
def _read_as_plan(path: Path) -> Iterator[None]:
    """Turn what a damaged or edited plan causes in the block into one line.

    Raises:
        InputError: the block found that something is missing or of the wrong type.
    """
    try:
        yield
    except InputError:
        raise  # it says more
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = shorten(f"{type(error).__name__}: {error}")
        raise InputError(f"{path}: not the plan of a table ({reason}); python -m tables writes it anew") from error


def _write_missing(path: Path, plan: dict[str, Any], missing: dict[str, str]) -> None:
    """List the cells that are not done, in a file and on the screen; no file where there are none."""
    for name, state in missing.items():
        announce(f"{name}: {state}")
    if not missing:
        path.unlink(missing_ok=True)
        return
    lines = [f"# {plan['title']}: {len(missing)} of {len(plan['cells'])} cells are missing\n"]
    write_text(path, "\n".join([*lines, *(f"- `{name}`: {state}" for name, state in missing.items())]) + "\n")


def render(path: Path) -> None:
    """Write table.md, table.csv, table.tex, table.png and table.pdf beside a plan; in missing.md, what is missing.

    Raises:
        InputError: the plan or a result is damaged, or a published table is not known.
        OSError: the folder cannot be written or the disk is full.
    """
    plan, tables = read_json(path, limit=64_000_000), published_tables()
    with _read_as_plan(path):
        lines = side_by_side(measured_lines(plan), published_lines(plan, tables))
        header, rows = table_of(plan, lines)
        missing = missing_cells(plan)
        text = "\n\n".join([f"# {plan['title']}", markdown(header, rows).strip(), *notes(plan, tables, missing)])
    import pandas  # takes a second, and only what follows needs it

    write_text(path.with_name("table.md"), text + "\n")
    _write_missing(path.with_name(MISSING), plan, missing)
    write_text(path.with_name("table.csv"), pandas.DataFrame(records_of(lines)).to_csv(index=False))
    latex = pandas.DataFrame(rows, columns=header).to_latex(index=False, escape=True, caption=plan["title"])
    write_text(path.with_name("table.tex"), latex.replace("±", r"$\pm$"))
    labels = [", ".join(filter(None, (line.setting and f"{plan['sweep']} {line.setting}",))) for line in lines]
    places = [(", ".join(filter(None, (_title(line), label))), line) for line, label in zip(lines, labels, strict=True)]
    plot_table(
        path.with_name("table.png"),
        [
            (
                label,
                bool(line.source),
                [
                    {figure: (group.mean(name), group.deviation(name)) for name, figure in FIGURES.items()}
                    if (group := line.groups.get(attack))
                    else {}
                    for attack in plan["attacks"]
                ],
            )
            for label, line in places
        ],
        [TITLES.get(attack, attack) for attack in plan["attacks"]],
    )
    announce(f"saved {path.with_name('table.md')}: {len(plan['cells']) - len(missing)} of {len(plan['cells'])} cells")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the rendering."""
    parser = make_parser(__doc__)
    parser.prog = "python -m tables.render"
    parser.add_argument("plan", metavar="PLAN", help="plan.json, which python -m tables wrote")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Render a table; returns the exit status."""
    args = build_parser().parse_args(argv)
    return guard(partial(render, Path(args.plan)), "tables")


if __name__ == "__main__":
    sys.exit(main())
