"""What the detector finds in networks of known attack: the tables of docs/detection.md.

Keep what a run of the detector found; the network's card is kept under the same name in results/networks/:
    python -m benchmarks.detection collect ./save/detection results/detection/blend-t5-s120.json

Print the tables:
    python -m benchmarks.detection table
"""

import argparse
import sys
from pathlib import Path

from benchmarks.kept import Result, Tables, keep_or_show, keeping_parser, read_kept
from benchmarks.tables import ROOT, TITLES, markdown
from utils.errors import InputError
from utils.files import read_json

RESULTS, NETWORKS, ZOO = ROOT / "results" / "detection", ROOT / "results" / "networks", ROOT / "zoo"
TAKEN = 50.0  # percent; with a lower ASR an attack has not taken hold, and its network counts as neither
ZOO_GROUP, IN_VIEW, UNSEEN = "zoo (in view)", "others in view", "not in view"
FIRST_UNSEEN = 130  # seed; of networks with it or a later one nothing went into detector or rule, but for one:
SUGGESTED = "blend-t9-s144"  # what it looked like before suggested how the detector combines its statistics
FOUND = ("backdoored", "suspect", "p_value", "statistics", "assignment")  # what is kept of detection.json
REMEMBERED = ("runtime", "seconds", "versions")  # kept, too; the oldest files lack it


def collect(folder: Path) -> Result:
    """Return what the detector wrote to a folder.

    Raises:
        InputError: there is no detection.json, or it is damaged.
    """
    found = read_json(folder / "detection.json")
    if lacking := {*FOUND, *REMEMBERED} - found.keys():
        raise InputError(f"{folder / 'detection.json'}: it lacks {', '.join(sorted(lacking))}; detect anew")
    return {name: found[name] for name in (*FOUND, *REMEMBERED)}


def load(folder: Path = RESULTS) -> dict[str, Result]:
    """Return the results on file by network, with attack and metrics of the network's card.

    Raises:
        InputError: a file is damaged, or a network has no card.
    """
    results = read_kept(folder, set(FOUND))
    for name, result in results.items():
        card = card_of(name)
        result.update(attack=card["attack"], metrics=card["metrics"])
    return results


def suspected(found: Result) -> str:
    """Return what a detection calls backdoored; nothing where that is nothing."""
    if not found["backdoored"]:
        return ""
    return "each to another" if found["suspect"] is None else f"class {found['suspect']}"


def is_backdoored(result: Result) -> bool | None:
    """Return whether a network is backdoored; None where an attack has not taken hold."""
    asr = result["metrics"].get("attack_success_rate")
    return False if asr is None else True if asr >= TAKEN else None


def is_right(result: Result) -> bool:
    """Return whether a backdoored network was called so, for its class or, all-to-all, for no single one."""
    return (
        bool(is_backdoored(result))
        and result["backdoored"]
        and result["suspect"] == result["attack"].get("poison_target")
    )


def networks_table(results: dict[str, Result]) -> str:
    """One row for each network: class, value and p-value of both statistics' largest, the assignment's lead."""
    rows = []
    for name, result in results.items():
        metrics = result["metrics"]
        asr = metrics.get("attack_success_rate")
        cells = [f"`{name}`", f"{metrics['clean_accuracy']:.2f}" + ("" if asr is None else f" / {asr:.2f}")]
        for statistic, factor in (("margin", 1), ("noise", 100)):
            found = result["statistics"][statistic]
            largest = factor * found["values"][found["suspect"]]
            cells.append(f"{found['suspect']}: {largest:.1f} ({_small(found['p_value'])})")
        assignment = result["assignment"]
        cells.append(f"{100 * assignment['ahead']:.2f} ({_small(assignment['p_value'])})" if assignment else "-")
        rows.append([*cells, _small(result["p_value"]), suspected(result) or "-"])
    return markdown(["network", "C-Acc / ASR", "margin", "noise, %", "assignment, %", "p", "suspected"], rows)


def _small(p_value: float) -> str:
    return "< 1e-6" if p_value < 1e-6 else f"{p_value:.2g}"


def counts_table(results: dict[str, Result]) -> str:
    """One row for each attack: of how many networks how many were called backdoored, how many for the right class."""
    rows, groups = [], by_group(results)
    for attack, title in TITLES.items():
        cells = []
        for group in groups.values():
            members = [each for each in group.values() if each["attack"]["poison_type"] == attack]
            members = [each for each in members if is_backdoored(each) is not None]
            called, right = sum(each["backdoored"] for each in members), sum(map(is_right, members))
            of = "" if attack == "benign" else f", {right} right"
            cells.append(f"{called} of {len(members)}{of}" if members else "-")
        if any(cell != "-" for cell in cells):
            rows.append([title, *cells])
    return markdown(["attack", *groups], rows)


def card_of(name: str) -> Result:
    """Return the card of a network; raises ``InputError`` where it has none."""
    own = ZOO / name / "last_model.json"
    return read_json(own if own.exists() else NETWORKS / f"{name}.json")


def by_group(results: dict[str, Result]) -> dict[str, dict[str, Result]]:
    """Sort networks by what was in view when detector and rule got their form.

    Raises:
        InputError: a network has no card.
    """
    groups = {ZOO_GROUP: {}, IN_VIEW: {}, UNSEEN: {}}
    for name, result in results.items():
        seen = name == SUGGESTED or card_of(name)["seed"] < FIRST_UNSEEN
        groups[ZOO_GROUP if (ZOO / name).is_dir() else IN_VIEW if seen else UNSEEN][name] = result
    return groups


TABLES: Tables = {
    "counts": counts_table,
    "zoo": lambda results: networks_table(by_group(results)[ZOO_GROUP]),
    "in-view": lambda results: networks_table(by_group(results)[IN_VIEW]),
    "unseen": lambda results: networks_table(by_group(results)[UNSEEN]),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    return keeping_parser(__doc__)


def main(argv: list[str] | None = None) -> int:
    """Collect or print; returns the exit status."""
    return keep_or_show(build_parser().parse_args(argv), collect, load, TABLES)


if __name__ == "__main__":
    sys.exit(main())
