"""The tables of README.md and docs/, made from results/*.json, and result files made from the logs of a run.

Write every table anew, or only say which are stale (exit status 1):
    python -m benchmarks.tables
    python -m benchmarks.tables --check

Make a result file of a folder in which all three steps have ended:
    python -m benchmarks.tables collect ./save results/my-run.json --hardware "8 cores of ..."

A table stands between <!-- table: NAME --> and <!-- end -->. docs/files.md describes the entries of a result file.
"""

import argparse
import json
import re
import shlex
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from defenses.pruning import largest_within_drop
from utils.errors import InputError
from utils.files import write_text
from utils.table import read_table

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.S)
TITLES = {
    "badnets": "BadNets",
    "blend": "Blend",
    "sig": "SIG",
    "clean-label": "clean-label",
    "iab-one": "input-aware, all-to-one",
    "iab-all": "input-aware, all-to-all",
    "badnets-all": "BadNets, all-to-all",
    "benign": "benign (no backdoor)",
}
WIDTHS = {0.25: "1/4 width", 1.0: "full width"}
FIXED, DROP = ("threshold", 0.2), ("max_acc_drop", 3)  # the two rules of step 3 that the tables show
REQUIRED = {
    "run": ("attack", "seed", "arch", "widen_factor", "neurons", "training", "before", "by_threshold", "chosen"),
    "speed": ("rows", "other_runs", "versions", "precision"),
    "precision": ("rows",),
    "published": ("rows", "release_by_threshold", "release_by_number"),
}
FIGURES = {"clean_accuracy": "C-Acc %", "attack_success_rate": "ASR %", "defender_accuracy": "defender acc %"}
UNTOLD_FLAGS = {"--data-dir": 1, "--resume": 0, "--overwrite": 0}  # with how many values; they change no result

Result = dict[str, Any]


# Reading and writing result files


def load_results(folder: Path) -> list[Result]:
    """Read every result file of a folder.

    Returns:
        The results; runs in the order of the tables: by width, attack and seed.

    Raises:
        InputError: a file is no JSON, or an entry that the tables need is missing.
    """
    return sorted(map(load_result, sorted(folder.glob("*.json"))), key=_place)


def load_result(path: Path) -> Result:
    """Read one result file; raises as ``load_results``."""
    result = _read_json(path)
    content = result.get("content")
    if content not in REQUIRED:
        raise InputError(f"{path}: content is {content!r}, expected one of {', '.join(REQUIRED)}")
    missing = [name for name in REQUIRED[content] if name not in result]
    if missing:
        raise InputError(f"{path}: no entry {missing[0]!r}")
    return {"file": path.name, **result}


def _read_json(path: Path) -> Result:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


def load_zoo(folder: Path) -> list[Result]:
    """Read the cards of the zoo's networks; raises ``InputError`` where one is no JSON."""
    paths = sorted(folder.glob("*/last_model.json"))
    return [{"content": "network", "name": path.parent.name, **_read_json(path)} for path in paths]


def _place(result: Result) -> tuple:
    if result["content"] != "run":
        return (result["content"],)
    attacks = list(TITLES)
    attack = attacks.index(result["attack"]) if result["attack"] in attacks else len(attacks)
    return "run", result["widen_factor"], attack, result["seed"], result["file"]


def result_text(result: Result) -> str:
    """Return a result as JSON with one row of a list a line, so that a changed figure is a changed line."""
    entries = []
    for name, value in result.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n  ]"
        entries.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


# Rendering


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join("|" + "".join(f" {cell} |" if cell else " |" for cell in cells) + "\n" for cells in lines)


def pair(row: Result | None) -> str:
    """Return C-Acc / ASR in percent; a dash where one is not known."""
    known = [(row or {}).get(name) for name in ("clean_accuracy", "attack_success_rate")]
    return " / ".join("-" if value is None else f"{value:.2f}" for value in known)


def title(run: Result) -> str:
    """Return a run's attack as the tables name it."""
    return TITLES.get(run["attack"], run["attack"])


def network(run: Result) -> str:
    """Return width and length of the training, and the architecture where it is not ResNet-18."""
    arch = [] if run["arch"] == "resnet18" else [run["arch"]]
    epochs = run["training"].get("epochs")
    return ", ".join([*arch, _width(run), f"{epochs} epochs" if epochs else "length unknown"])


def _width(run: Result) -> str:
    return WIDTHS.get(run["widen_factor"], f"width {run['widen_factor']:g}")


def chosen_row(run: Result, rule: tuple[str, float], sweep: str) -> Result | None:
    """Return the row that a rule chose in a sweep; None where the rule was not applied.

    Args:
        run: a result.
        rule: name and value, such as ``FIXED``.
        sweep: ``threshold`` or ``number``.

    Raises:
        InputError: the row is not in the file.
    """
    for entry in run["chosen"]:
        if (entry["rule"], entry["value"], entry["sweep"]) == (*rule, sweep):
            if entry["at"] is None:
                return {"pruned": 0, "threshold": None, **run["before"]}
            key = "threshold" if sweep == "threshold" else "pruned"
            for row in run.get(f"by_{sweep}", []):
                if row[key] == entry["at"]:
                    return row
            raise InputError(f"{run['file']}: {entry['rule']} chose {key} {entry['at']}, but there is no such row")
    return None


def _runs(results: list[Result]) -> list[Result]:
    return [result for result in results if result["content"] == "run"]


def _only(results: list[Result], content: str) -> Result:
    found = [result for result in results if result["content"] == content]
    if len(found) != 1:
        raise InputError(f"results: {len(found)} files with content {content!r}, expected one")
    return found[0]


def mean(rows: list[Result | None]) -> Result | None:
    """Return the mean figures of some rows; None where a row is missing."""
    if not all(rows):
        return None
    known = {name: [row.get(name) for row in rows] for name in ("clean_accuracy", "attack_success_rate")}
    return {name: None if None in values else statistics.fmean(values) for name, values in known.items()}


def main_table(results: list[Result]) -> str:
    """One row for each attack and network; runs that differ in nothing but the seed are averaged."""
    groups = defaultdict(list)
    for run in _runs(results):
        groups[title(run), network(run)].append(run)
    rows = []
    for (attack, trained), runs in groups.items():
        name = f"{attack}, mean of {len(runs)} seeds" if len(runs) > 1 else attack
        before = mean([run["before"] for run in runs])
        after = [mean([chosen_row(run, rule, "threshold") for run in runs]) for rule in (FIXED, DROP)]
        rows.append([name, trained, pair(before), *map(pair, after)])
    return markdown(["attack", "network", "before", "threshold 0.2", "at most 3 points lost"], rows)


def runs_table(results: list[Result]) -> str:
    """Every run, with the number of neurons that each rule prunes and the minutes of steps 1 and 2."""
    rows = []
    for run in _runs(results):
        fixed, drop = (chosen_row(run, rule, "threshold") for rule in (FIXED, DROP))
        minutes = run.get("minutes", {})
        rows.append(
            [
                f"{title(run)}, seed {run['seed']}",
                network(run),
                pair(run["before"]),
                f"{pair(fixed)} ({fixed['pruned']})" if fixed else "-",
                f"{_threshold(drop)}: {pair(drop)} ({drop['pruned']})" if drop else "-",
                " + ".join(str(minutes.get(step) or "-") for step in ("train", "optimize")),
            ]
        )
    header = ["attack", "network", "before", "threshold 0.2", "at most 3 points lost", "minutes, step 1 + 2"]
    return markdown(header, rows)


def _threshold(row: Result) -> str:
    return "none" if row["threshold"] is None else f"{row['threshold']:g}"


def _share(count: int, run: Result) -> float:
    """Return a number of neurons in percent of the run's, rounded so that it can be compared."""
    return round(100 * count / run["neurons"], 4)


def number_table(results: list[Result]) -> str:
    """The sweeps by number side by side, at the shares that most runs have, and what the rule of 3 points chose."""
    runs = [run for run in _runs(results) if run.get("by_number")]
    sweeps = [{_share(row["pruned"], run): row for row in run["by_number"]} for run in runs]
    frequent = Counter(share for sweep in sweeps for share in sweep)
    shares = sorted(share for share, count in frequent.items() if 2 * count > len(runs))
    rows = [[f"{share:g} %", *(pair(sweep.get(share)) for sweep in sweeps)] for share in shares]
    last = [chosen_row(run, DROP, "number") for run in runs]
    picked = zip(runs, last, strict=True)
    cells = [f"{_share(row['pruned'], run):g} %: {pair(row)}" if row else "-" for run, row in picked]
    names = [f"{title(run)}, seed {run['seed']}, {_width(run)}" for run in runs]
    return markdown(["neurons pruned", *names], [*rows, ["at most 3 points lost", *cells]])


def sweeps_text(results: list[Result]) -> str:
    """A section for each run whose sweep over thresholds is on file as a whole."""
    return "\n".join(_section(run) for run in _runs(results) if not run.get("excerpt"))


def _section(run: Result) -> str:
    header = ["threshold", "neurons pruned", "C-Acc / ASR", "accuracy on the clean images"]
    rows = []
    for row in [{"threshold": None, "pruned": 0, **run["before"]}, *run["by_threshold"]]:
        defender = row.get("defender_accuracy")
        pruned = f"{row['pruned']} ({100 * row['pruned'] / run['neurons']:.2f} %)"
        rows.append([_threshold(row), pruned, pair(row), "-" if defender is None else f"{defender:.2f}"])
    compute = run.get("compute", {})
    facts = [compute.get("hardware"), compute.get("precision"), _versions(run)]
    heading = f"### {title(run)}, {network(run)}, seed {run['seed']}\n\n"
    note = f"{run['note']}\n\n" if run.get("note") else ""
    commands = "```bash\n" + "".join(f"{command}\n" for command in run.get("commands", [])) + "```\n\n"
    computed = f"Computed on: {', '.join(fact for fact in facts if fact)}.\n\n"
    return heading + note + computed + commands + markdown(header, rows)


def _versions(result: Result) -> str:
    names = {"torch": "torch", "python": "Python"}
    return ", ".join(f"{names[name]} {value}" for name, value in result.get("versions", {}).items() if name in names)


def commands_text(results: list[Result]) -> str:
    """The command lines of the first run, then step 1 of every other run of which only excerpts are shown."""
    first, *others = [run for run in _runs(results) if run.get("excerpt")] or [{"commands": []}]
    lines = [*first["commands"], *(run["commands"][0] for run in others)]
    return "```bash\n" + "".join(f"{line}\n" for line in lines) + "```\n"


def speed_table(results: list[Result]) -> str:
    """Images per second of the plain and the fast loops, with their share of the peak."""
    speed, rows = _only(results, "speed"), []
    for row in speed["rows"]:
        plain = [f"{row['plain']:.1f}", f"{row['plain_percent_of_peak']} %"] if "plain" in row else ["", ""]
        speed_up = f"{row['speed_up']:.2f}x" if "speed_up" in row else ""
        rows.append([row["loop"], *plain, f"{row['fast']:.1f}", f"{row['fast_percent_of_peak']} %", speed_up])
    header = ["", "plain", "of fp32 peak", "this project", f"of {speed['precision']} peak", "speed-up"]
    return markdown(header, rows)


def speed_runs_table(results: list[Result]) -> str:
    """The speed-ups of every run of the benchmark."""
    speed = _only(results, "speed")
    measured = [row for row in speed["rows"] if "speed_up" in row]
    first = {"versions": speed["versions"], "speed_ups": [row["speed_up"] for row in measured]}
    rows = [[_versions(run), *(f"{value:.2f}x" for value in run["speed_ups"])] for run in (first, *speed["other_runs"])]
    return markdown(["versions", *(row["loop"] for row in measured)], rows)


def precision_table(results: list[Result]) -> str:
    """How far bf16 and fp32 end apart."""
    rows = []
    for row in _only(results, "precision")["rows"]:
        differences = ", ".join(_difference(part) for part in row["c_acc_differences"])
        start = f"{row['asr_below_2_percent_from']:.2f}"
        rows.append([row["masks"], f"{row['correlation']:g}", differences, start])
    return markdown(["", "masks, correlation", "largest difference in C-Acc", "ASR below 2 % from threshold"], rows)


def _difference(part: dict[str, float]) -> str:
    words = {"up_to": "up to threshold", "at": "at"}
    where = "".join(f" {word} {part[key]:.2f}" for key, word in words.items() if key in part)
    return f"{part['points']:g} points{where}"


def paper_table(results: list[Result]) -> str:
    """What the paper reports."""
    rows = [[title(row), pair(row["before"]), pair(row["after"])] for row in _only(results, "published")["rows"]]
    return markdown(["attack", "before", "after ANP"], rows)


def release_table(results: list[Result]) -> str:
    """The sweeps that the authors' release plots, side by side."""
    published = _only(results, "published")
    thresholds = [(f"{row['threshold']:g}", _plain_pair(row)) for row in published["release_by_threshold"]]
    shares = [(f"{row['percent']:g} %", _plain_pair(row)) for row in published["release_by_number"]]
    length = max(len(thresholds), len(shares))
    columns = [part + [("", "")] * (length - len(part)) for part in (thresholds, shares)]
    rows = [[*left, *right] for left, right in zip(*columns, strict=True)]
    return markdown(["threshold", "C-Acc / ASR", "neurons pruned", "C-Acc / ASR"], rows)


def _plain_pair(row: Result) -> str:
    return f"{row['clean_accuracy']:g} / {row['attack_success_rate']:g}"


def zoo_table(results: list[Result]) -> str:
    """The networks of zoo/, from their cards."""
    rows = [
        [f"`{network['name']}`", title({"attack": network["attack"]["poison_type"]}), pair(network["metrics"])]
        for network in results
        if network.get("content") == "network"
    ]
    return markdown(["name", "attack", "C-Acc / ASR"], rows)


TABLES: dict[str, Callable[[list[Result]], str]] = {
    "zoo": zoo_table,
    "main": main_table,
    "runs": runs_table,
    "by-number": number_table,
    "sweeps": sweeps_text,
    "commands": commands_text,
    "speed": speed_table,
    "speed-runs": speed_runs_table,
    "precision": precision_table,
    "paper": paper_table,
    "release": release_table,
}


def replace_tables(path: Path, results: list[Result]) -> tuple[str, list[str]]:
    """Render the tables of one document.

    Args:
        path: the document.
        results: of ``load_results``.

    Returns:
        The new text, and the names of the tables that differ from what is there.

    Raises:
        InputError: a table is unknown or has no end, or the results lack what it shows.
    """
    text, stale = path.read_text(), []

    def render(match: re.Match) -> str:
        start, name, old, end = match.groups()
        if name not in TABLES:
            raise InputError(f"{path}: no table is called {name!r}; there are {', '.join(TABLES)}")
        try:
            new = TABLES[name](results)
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: table {name}: the result files lack an entry ({error!r})") from error
        if new != old:
            stale.append(name)
        return start + new + end

    new_text, count = MARKED.subn(render, text)
    if count != text.count("<!-- table:"):
        raise InputError(f"{path}: {text.count('<!-- table:')} tables begin, but only {count} end with <!-- end -->")
    return new_text, stale


def update(root: Path, check: bool) -> int:
    """Render the tables of README.md and docs/*.md.

    Args:
        root: the folder of README.md, docs/, results/ and zoo/.
        check: write nothing, and print one line for each stale table.

    Returns:
        The exit status: 1 if ``check`` found a stale table, else 0.

    Raises:
        InputError: a result file or a document is damaged.
        OSError: a document cannot be read or written.
    """
    results, status = load_results(root / "results") + load_zoo(root / "zoo"), 0
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        text, stale = replace_tables(path, results)
        for name in stale:
            what = "is stale; python -m benchmarks.tables writes it anew" if check else "written"
            print(f"{path.relative_to(root)}: table {name} {what}")
        if stale and check:
            status = 1
        elif stale:
            write_text(path, text)
    return status


# Collecting


def collect(args: argparse.Namespace) -> Result:
    """Make a result of a folder in which steps 2 and 3 have ended.

    Args:
        args: ``folder``, ``output``, and what the folder itself may not say: ``attack``, ``epochs``, ``hardware``,
            ``note``.

    Returns:
        The result. Its command lines name no absolute path.

    Raises:
        InputError: a log is missing, damaged, of an unfinished run or of another checkpoint, or neither a card nor a
            flag says what the attack was.
    """
    logs = _logs(Path(args.folder))
    records = {step: record for step, (record, _) in logs.items()}
    options = records["optimize"]["arguments"]
    card = _cards(Path(args.folder), records["optimize"])
    before, *by_threshold = logs["pruning_by_threshold"][1]
    _, *by_number = logs["pruning_by_number"][1] if "pruning_by_number" in logs else [None]
    return {
        "content": "run",
        "attack": _known("--attack", args.attack, (card.get("attack") or {}).get("poison_type")),
        "seed": card.get("seed", options["seed"]),
        "arch": card["arch"],
        "widen_factor": card["widen_factor"],
        "dataset": card["dataset"],
        "neurons": _neurons(args.folder, by_threshold),
        "training": {"epochs": _known("--epochs", args.epochs, card.get("epochs")), **_schedule(records)},
        "masks": {"iterations": options["nb_iter"], "val_frac": options["val_frac"]},
        "compute": {**({"hardware": args.hardware} if args.hardware else {}), **_compute(records)},
        "versions": records["pruning_by_threshold"]["versions"],
        "minutes": {step: round(logs[step][1][-1]["seconds"] / 60) for step in ("train", "optimize") if step in logs},
        "commands": [portable(record["command"], Path(args.output).stem) for record in records.values()],
        "before": _figures(before),
        "by_threshold": [{"threshold": _point(row), "pruned": row["pruned"], **_figures(row)} for row in by_threshold],
        "by_number": [{"pruned": row["pruned"], "mask": row["mask"], **_figures(row)} for row in by_number],
        "chosen": [*_choose("threshold", before, by_threshold), *_choose("number", before, by_number)],
        **({"note": args.note} if args.note else {}),
        "source": "Collected from the logs of the run by python -m benchmarks.tables collect.",
    }


def _logs(folder: Path) -> dict[str, tuple[dict, list[dict]]]:
    """Return record and rows of each step's log, in the order of the steps."""
    logs = {"optimize": finished_log(folder, "optimize")}
    checkpoint = folder / Path(logs["optimize"][0]["arguments"]["checkpoint"]).name
    if (folder / "train_log.jsonl").exists() and checkpoint.with_suffix(".json").exists():
        logs = {"train": finished_log(folder, "train"), **logs}  # the training that made this checkpoint
    logs["pruning_by_threshold"] = finished_log(folder, "pruning_by_threshold")
    if (folder / "pruning_by_number_log.jsonl").exists():
        logs["pruning_by_number"] = finished_log(folder, "pruning_by_number")
    digests = {_digest(record) for step, (record, _) in logs.items() if step != "train"}
    if len(digests) > 1:
        raise InputError(f"{folder}: the logs of steps 2 and 3 are of different checkpoints; repeat step 3")
    return logs


def finished_log(folder: Path, step: str) -> tuple[dict, list[dict]]:
    """Read the log of a step: the record and the rows; raises ``InputError`` where the run has not ended."""
    path = folder / f"{step}_log.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: no such file; run steps 2 and 3 in this folder first")
    record, rows = read_table(path)
    if not record.get("ended") or not rows:
        raise InputError(f"{path}: the log of an unfinished run; finish it first")
    return record, rows


def _digest(record: dict) -> str | None:
    """Return the sha256 of the checkpoint that a step read."""
    return record["arguments"].get("sha256", {}).get("checkpoint")


def _cards(folder: Path, record: dict) -> dict:
    """Return what the cards of the checkpoint and of the repaired network say; the checkpoint's comes first."""
    checkpoint, known = Path(record["arguments"]["checkpoint"]), {}
    for path in (folder / "repaired_model.th", checkpoint, folder / checkpoint.name):
        if path.with_suffix(".json").is_file():
            card = _read_json(path.with_suffix(".json"))
            if card.get("repaired_from", card).get("sha256") == _digest(record):
                known.update(card)
    if "arch" not in known:
        raise InputError(f"{folder}: neither the checkpoint nor repaired_model.th has its card here; repeat step 3")
    return known


def _known(flag: str, given: Any, found: Any) -> Any:
    """Return what the card or else the flag says; raises ``InputError`` where neither speaks or they disagree."""
    if given is None and found is None:
        raise InputError(f"the checkpoint has no card that says it; give {flag}")
    if None not in (given, found) and given != found:
        raise InputError(f"{flag} {given} contradicts the checkpoint's card, which says {found}; leave the flag out")
    return found if given is None else given


def _neurons(folder: str, rows: list[dict]) -> int:
    """Return the number of the network's neurons: the pruned ones and their share give it."""
    pruned = [row for row in rows if row["pruned"]]
    if not pruned:
        raise InputError(f"{folder}: the sweep over thresholds prunes nothing; repeat it with a larger --pruning-max")
    return round(100 * pruned[-1]["pruned"] / pruned[-1]["pruned %"])


def _schedule(records: dict[str, dict]) -> dict:
    options = records.get("train", {}).get("arguments", {})
    return {name: options[name] for name in ("lr", "lr_schedule") if name in options}


def _compute(records: dict[str, dict]) -> dict:
    runtime = records["optimize"]["runtime"]
    names = {"train": "train", "optimize": "optimize", "pruning_by_threshold": "prune"}
    return {
        "device": runtime["device"],
        "precision": runtime["precision"].replace("torch.bfloat16", "bf16").replace("torch.float32", "fp32"),
        "threads": {name: records[step]["runtime"]["threads"] for step, name in names.items() if step in records},
    }


def _figures(row: dict) -> dict[str, float | None]:
    return {name: None if row[column] is None else round(row[column], 2) for name, column in FIGURES.items()}


def _choose(sweep: str, before: dict, rows: list[dict]) -> list[dict]:
    """Apply the rules of step 3 to the rows of a log; the fixed threshold to a sweep over thresholds alone."""
    if not rows:
        return []
    accuracies = [row["defender acc %"] / 100 for row in (before, *rows)]
    places = [None, *(_point(row) if sweep == "threshold" else row["pruned"] for row in rows)]
    found = [(DROP, places[largest_within_drop(accuracies, DROP[1] / 100)])]
    if sweep == "threshold" and FIXED[1] in places:
        found.insert(0, (FIXED, FIXED[1]))
    return [{"rule": name, "value": value, "sweep": sweep, "at": at} for (name, value), at in found]


def _point(row: dict) -> float:
    """Return the threshold of a row; logs of version 1.0.0 call it mask."""
    return row["threshold"] if "threshold" in row else row["mask"]


def portable(command: str, name: str) -> str:
    """Return a command line without the places of the machine it ran on.

    Args:
        command: as a log records it.
        name: the run; its output folder becomes ``save/NAME`` where it lay outside the working folder.
    """
    words = shlex.split(command)
    output = next((after for word, after in pairwise(words) if word == "--output-dir"), None)
    kept, skip = [], 0
    for word in words:
        if skip:
            skip -= 1
        elif word.partition("=")[0] in UNTOLD_FLAGS:
            skip = UNTOLD_FLAGS.get(word, 0)  # none where the value came as --flag=value
        else:
            flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
            kept.append(flag + equals + _portable_path(value, output, name))
    return shlex.join(kept)


def _portable_path(word: str, output: str | None, name: str) -> str:
    path = PurePosixPath(word)
    if not (path.is_absolute() or ".." in path.parts or word.startswith("~")):
        return word
    if output and path.is_relative_to(output):
        return str(PurePosixPath("save", name) / path.relative_to(output))
    return path.name


def collect_into(args: argparse.Namespace) -> int:
    """Write the result file of a run; returns the exit status, raises as ``collect``."""
    output = Path(args.output)
    if output.suffix != ".json":
        raise InputError(f"{output}: the name of a result file ends in .json")
    if output.exists() and not args.overwrite:
        raise InputError(f"{output} is there already; choose another name or --overwrite")
    try:
        result = collect(args)
    except (KeyError, TypeError) as error:
        raise InputError(f"{args.folder}: its logs or cards are not of this version ({error!r})") from error
    write_text(output, result_text(result))
    return 0


# The command line


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tables."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a table is stale")
    task = parser.add_subparsers(dest="task", metavar="collect")
    task = task.add_parser("collect", help="make a result file of a finished run", allow_abbrev=False)
    task.add_argument("folder", metavar="FOLDER", help="output folder of the three steps")
    task.add_argument("output", metavar="FILE", help="the result file, results/NAME.json")
    task.add_argument("--attack", metavar="NAME", help="the --poison-type, where the checkpoint has no card")
    task.add_argument("--epochs", type=int, metavar="N", help="epochs of step 1, where the checkpoint has no card")
    task.add_argument("--hardware", metavar="TEXT", help="what the run was computed on")
    task.add_argument("--note", metavar="TEXT", help="what a reader has to know of this run")
    task.add_argument("--overwrite", action="store_true", help="replace the result file")
    return parser


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Render, check or collect; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        return collect_into(args) if args.task else update(root, args.check)
    except (InputError, OSError) as error:
        print(f"tables: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
