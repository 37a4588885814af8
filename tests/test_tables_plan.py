"""Table files: what they become, what is wrong with them, and how results are put together."""

import itertools
import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("yaml", reason="PyYAML is not installed (requirements-tables.txt)")

from tables.__main__ import build_parser, main, snakemake
from tables.cells import DONE, RESULTS, ROOT
from tables.plan import make_plan
from tables.published import published_tables
from tables.render import (
    TIMED,
    Line,
    mean_change,
    measured_lines,
    missing_cells,
    notes,
    published_lines,
    side_by_side,
    table_of,
)
from utils.errors import InputError

TINY = """
title: tiny
attacks:
  badnets: --poison-type badnets --poison-rate 0.2
  benign: --poison-type benign
training: --epoch 1 --widen-factor 0.125
flags: --dataset synthetic
defenses:
  ANP: anp --nb-iter 3 --threshold 0.3
  ANP + FT: [anp --nb-iter 3 --threshold 0.3, ft --nb-iter 2]
seeds: [0, 1]
"""


@pytest.fixture
def plan_of(tmp_path):
    def make(text):
        path = tmp_path / "tiny.yaml"
        path.write_text(text)
        return make_plan(path, Path("cells"))

    return make


def kinds(plan):
    return sorted(cell.kind for cell in plan.cells.values())


def test_a_tiny_table(plan_of):
    plan = plan_of(TINY)
    assert kinds(plan) == sorted(["train", "evaluate", "masks", "prune", "defend"] * 4)
    assert [row.defense for row in plan.rows] == ["before", "ANP", "ANP + FT"]
    assert all(len(runs) == 2 for row in plan.rows for runs in row.runs.values())
    for cell in plan.cells.values():
        assert set(cell.needs) <= plan.cells.keys() and bool(cell.needs) == (cell.kind != "train")
        assert cell.command[cell.command.index("--threads") + 1] == "1"
        assert ("--resume" in cell.command) == (cell.kind != "evaluate")
        benign = "benign" in cell.name
        assert cell.kind == "train" or ("--trigger-info" in cell.command) != benign, "a benign network has no trigger"


def test_a_chain_defends_what_came_before(plan_of):
    plan = plan_of(TINY)
    masks, prune, defend = (plan.cells[name] for name in plan.rows[2].runs["badnets"][0])
    assert [masks.kind, prune.kind, defend.kind] == ["masks", "prune", "defend"]
    assert f"cells/{masks.name}/mask_values.txt" in prune.command and masks.name in prune.needs
    assert f"cells/{prune.name}/repaired_model.th" in defend.command and prune.name in defend.needs
    assert plan.rows[1].runs["badnets"][0] == [masks.name, prune.name], "the first defence is shared"
    assert "--threshold" in prune.command and "--threshold" not in masks.command


def test_a_changed_setting_leads_to_another_folder(plan_of):
    old, new = plan_of(TINY), plan_of(TINY.replace("--poison-rate 0.2", "--poison-rate 0.3"))
    shared = old.cells.keys() & new.cells.keys()
    assert shared and all("badnets" not in name for name in shared), "all that depends on it has changed"
    new = plan_of(TINY.replace("ft --nb-iter 2", "ft --nb-iter 4"))
    assert {old.cells[name].kind for name in old.cells.keys() - new.cells.keys()} == {"defend"}


def test_spelling_and_defaults_make_no_difference(plan_of):
    text = TINY.replace("--poison-rate 0.2", "--poison-rate=0.20 --poison-target 0").replace(
        "anp --n", "anp --lr 0.2 --n"
    )
    assert plan_of(text).cells.keys() == plan_of(TINY).cells.keys()
    assert plan_of(TINY + "seconds: true\npublished: [paper]").cells.keys() == plan_of(TINY).cells.keys()


def test_networks_of_the_zoo_and_paths(plan_of, tmp_path):
    own = tmp_path / "own.th"
    own.write_bytes(b"1")
    text = f"networks:\n  badnets: badnets-[0-9]\n  own: {{checkpoint: {own}, trigger: badnets-0}}\n  benign: benign-0"
    plan = plan_of(text)
    runs = plan.rows[0].runs
    assert len(runs["badnets"]) == len(list(ROOT.glob("zoo/badnets-[0-9]"))) and len(plan.rows) == 1
    assert "--trigger-info" not in plan.cells[runs["benign"][0][0]].command
    own.write_bytes(b"2")
    assert plan_of(text).rows[0].runs["own"] != runs["own"], "a file counts by its content"


def test_a_sweep_goes_to_whoever_takes_it(plan_of):
    plan = plan_of(TINY + "sweep: {title: noise, values: {1: --anp-eps 0.1, 2: --anp-eps 0.2}}")
    assert [(row.defense, row.setting) for row in plan.rows] == [
        ("before", ""), ("ANP", "1"), ("ANP", "2"), ("ANP + FT", "1"), ("ANP + FT", "2")]  # fmt: skip
    assert kinds(plan).count("train") == 4 and kinds(plan).count("masks") == 8


def test_a_surrogate_is_trained_first(plan_of):
    plan = plan_of(
        "attacks: {clean-label: --poison-type clean-label --clb-surrogate surrogate}\nsurrogate: --poison-type benign"
    )
    first, second = sorted((cell for cell in plan.cells.values() if cell.kind == "train"), key=lambda cell: cell.needs)
    assert second.needs == [first.name] and f"cells/{first.name}/last_model.th" in second.command


@pytest.mark.parametrize("path", sorted(ROOT.glob("tables/*.yaml")), ids=lambda path: path.stem)
def test_the_table_files_of_the_project_are_right(path):
    plan = make_plan(path)
    assert set(plan.published) <= published_tables().keys() and len(plan.rows) > 2
    assert all(row.runs[attack] for row in plan.rows for attack in plan.attacks)


def test_the_table_of_seconds_shares_all_but_what_anp_makes():
    """As the page and the file say: their masks are learned, those of the main table are the zoo's."""
    whole, seconds = (make_plan(ROOT / "tables" / f"{name}.yaml") for name in ("main", "seconds"))
    own = {name for row in seconds.rows if "ANP" in row.defense for name in itertools.chain(*row.runs["badnets"])}
    assert own and seconds.cells.keys() - whole.cells.keys() == own


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: tiny", "titel: tiny", "no entry is called 'titel'"),
        ("title: tiny", "title: tiny\ntitle: again", "'title' comes twice"),
        ("title: tiny", "title: [", "not YAML"),
        ("title: tiny", "title: 3", "title: expected a text, found 3"),
        (TINY, "title: nothing", "names no networks"),
        (TINY, "- a list", "expected a mapping"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "different whole numbers"),
        ("seeds: [0, 1]", "seeds: 3", "expected a list"),
        ("seeds: [0, 1]", "networks: {x: no-such-net}", "no network 'no-such-net' in the zoo"),
        ("seeds: [0, 1]", "networks: {badnets: badnets-0}", "stands in networks and in attacks"),
        ("seeds: [0, 1]", "published: [nobody]", "published: no table 'nobody'"),
        ("seeds: [0, 1]", "published: [ft-sam-2500]", "published: ft-sam-2500 has no figures of these attacks"),
        ("seeds: [0, 1]", "sweep: {title: x}", "sweep: needs title and values"),
        ("seeds: [0, 1]", "sweep: {title: x, values: {1: --sam-rho 1}}", "no command of this table takes '--sam-rho'"),
        ("  ANP: anp", "  before: anp", "defenses: before: so the row of the networks as they are is called"),
        ("  ANP: anp", "  before, again: anp", "defenses: before, again: so the row"),
        ("ft --nb-iter 2", "tf --nb-iter 2", "invalid choice: 'tf'"),
        ("ft --nb-iter 2", "ft --nb-itr 2", "did you mean --nb-iter?"),
        ("ft --nb-iter 2", "clp --nb-iter 2", "--nb-iter has no effect with --defense clp"),
        ("ft --nb-iter 2", "ft --nb-iter two", "invalid whole number value: 'two'"),
        ("ft --nb-iter 2", "anp --mask-file zoo", "the zoo has no masks"),
        ("ft --nb-iter 2", "anp --mask-file zoo --anp-eps 0.2", "--anp-eps has no effect with --mask-file"),
        ("ft --nb-iter 2", "ft --nb-iter 2 --nb-iter=3", "defenses: ANP + FT: --nb-iter comes twice"),
        ("seeds: [0, 1]", "surrogate: --poison-type benign", "surrogate: no attack has --clb-surrogate surrogate"),
        ("seeds: [0, 1]", "networks: {x: docs}", "docs: is a folder, expected a file"),
        ("seeds: [0, 1]", "networks: {x: {checkpoint: sig-0, trigger: no.th}}", "--trigger-info no.th: no such file"),
        ("seeds: [0, 1]", "networks: {x: {checkpoint: sig-0, trigger: benign-0}}", "the zoo has no such trigger"),
        ("anp --nb-iter 3", "anp --mask-file no.txt", "ANP: --mask-file no.txt: no such file, no address, and the zoo"),
        ("seeds: [0, 1]", "networks: {x: anp-release}", "--checkpoint anp-release: no such file"),
        ("--dataset synthetic", "--dataset folder:no", "--dataset folder:no: there is no such folder"),
        ("--dataset synthetic", "--data-dir no", "--data-dir no: there is no such folder"),
        ("--dataset synthetic", "--split-file no.txt", "--split-file no.txt: no such file"),
        ("badnets --poison-rate 0.2", "folder --poisoned-dir no", "--poisoned-dir no: no such folder"),
        ("anp --nb-iter 3", "anp --nb-ter 3", "unrecognized arguments: --nb-ter"),
        ("--epoch 1", "--output-dir x", "--output-dir is not for a table file"),
        ("--epoch 1", "epoch 1", "expected flags, found 'epoch'"),
        ("--dataset synthetic", "--datset synthetic", "did you mean --dataset?"),
        ("--poison-type badnets", "--poison-type bad", "attacks: badnets: train_backdoor_cifar.py"),
        ("--poison-type badnets", "--poison-type", "expected one argument"),
    ],
)
def test_a_mistake_is_one_line(plan_of, old, new, message):
    assert old in TINY
    with pytest.raises(InputError) as error:
        plan_of(TINY.replace(old, new))
    assert message in str(error.value) and "\n" not in str(error.value) and "tiny.yaml" in str(error.value)


# Rendering


def finish(plan, run, c_acc, asr=None, device="cpu"):
    """Leave what the cells of a run leave, made up."""
    metrics = {"clean_accuracy": c_acc} if asr is None else {"clean_accuracy": c_acc, "attack_success_rate": asr}
    for name in run:
        folder, kind = Path(plan["folder"], name), plan["cells"][name]["kind"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DONE).touch()
        if kind in RESULTS:
            (folder / RESULTS[kind]).write_text(json.dumps({"metrics": metrics}))
        if kind in TIMED:
            record = {"record": {"runtime": {"device": device}}}
            (folder / TIMED[kind]).write_text(json.dumps(record) + '\n{"seconds": 7}\n')


def test_aggregation_with_known_numbers(plan_of, tmp_path):
    plan = json.loads(plan_of("networks: {badnets: 'badnets-[0-2]', sig: sig-0}\ndefenses: {FT: ft}").as_json())
    plan["folder"] = str(tmp_path / "cells")
    before, after = (row["runs"] for row in plan["rows"])
    for run, figures in zip(before["badnets"], [(90, 100), (50, 60), (93, 98)], strict=True):
        finish(plan, run, *figures)
    finish(plan, before["sig"][0], 80, 90)
    finish(plan, after["badnets"][0], 88, 10)
    finish(plan, after["badnets"][2], 90, 0)
    finish(plan, after["sig"][0], 79, 2)
    old, new = measured_lines(plan)
    group = new.groups["badnets"]
    assert group.mean("clean_accuracy") == 89 and group.deviation("clean_accuracy") == pytest.approx(2**0.5)
    assert group.deviation("attack_success_rate") == pytest.approx(statistics.stdev([10, 0]))
    assert new.groups["sig"].deviation("clean_accuracy") is None, "of a single run"
    assert group.changes["clean_accuracy"] == [-2, -3], "each against its own network, whatever the others were"
    changes, count = mean_change(new)
    assert count == 2
    assert changes == {"clean_accuracy": pytest.approx(-1.75), "attack_success_rate": pytest.approx((-94 - 88) / 2)}
    assert mean_change(old) == ({}, 0)
    _, rows = table_of(plan, [old, new])
    assert rows[1][1:] == ["89.00 ± 1.41 / 5.00 ± 7.07 (2 of 3)", "79.00 / 2.00 (1)", "-1.75 / -91.00"]


def test_seconds_say_what_they_count_and_where(plan_of, tmp_path):
    plan = json.loads(plan_of("networks: {sig: sig-0}\ndefenses: {FT: ft, ANP: anp}\nseconds: true").as_json())
    plan["folder"] = str(tmp_path / "cells")

    def note():
        return next(text for text in notes(plan, {}, {}) if text.startswith("Seconds"))

    assert "the loading" in note() and "test set" in note() and "CPU" not in note()
    finish(plan, plan["rows"][1]["runs"]["sig"][0], 80, 90, "cuda:0")
    assert note().endswith(" Measured on cuda:0.")
    finish(plan, plan["rows"][2]["runs"]["sig"][0], 80, 90)
    assert note().endswith(" Measured on one CPU thread and cuda:0.")


def test_the_published_mean_changes_come_out():
    attacks = ["badnets", "blend", "iab-one", "iab-all", "clean-label", "sig"]
    plan = {"rows": [{"defense": "before"}, {"defense": "ANP"}], "attacks": attacks, "published": ["paper"]}
    before, after = published_lines(plan, published_tables())
    assert mean_change(before) == ({}, 0)
    changes, count = mean_change(after)
    assert count == 6
    stated = json.loads((ROOT / "results" / "published.json").read_text())["mean_change"]
    assert {name: round(value, 2) for name, value in changes.items()} == stated


def test_published_lines_stand_beside_our_own():
    ours = [Line(title, "", "", {}) for title in ("before", "FT, lr 0.01", "FT, lr 0.02")]
    lines = side_by_side(ours, [Line(title, "", "X", {}) for title in ("FT", "NC")])
    assert [each.title for each in lines] == ["before", "FT, lr 0.01", "FT, lr 0.02", "FT"]


@pytest.fixture
def partial_results(plan_of, tmp_path):
    """The plan of the tiny table with results of the networks before, and of one run of ANP."""
    plan = json.loads(plan_of(TINY).as_json())
    plan["folder"] = str(tmp_path / "cells")
    runs = [run for runs in plan["rows"][0]["runs"].values() for run in runs]
    runs.append(plan["rows"][1]["runs"]["badnets"][0])
    for run in runs:
        finish(plan, run, 80.0, None if "benign" in run[-1] else 9)
    (tmp_path / "cells" / next(name for name in plan["cells"] if name.startswith("defend"))).mkdir()
    path = tmp_path / "out" / "plan.json"
    path.parent.mkdir()
    path.write_text(json.dumps(plan))
    return path


def test_a_table_of_what_is_there(partial_results):
    plan = json.loads(partial_results.read_text())
    plan["seconds"] = True
    header, rows = table_of(plan, measured_lines(plan))
    assert header == ["defence", "BadNets", "benign (no backdoor)", "mean change", "seconds"]
    assert rows[0] == ["before", "80.00 ± 0.00 / 9.00 ± 0.00 (2)", "80.00 ± 0.00 / - (2)", "-", "-"]
    assert rows[1] == ["ANP", "80.00 / 9.00 (1 of 2)", "-", "+0.00 / +0.00 (1 of 2)", "7"]
    assert rows[2] == ["ANP + FT", "-", "-", "-", "-"]
    log = next(Path(plan["folder"]).glob("defend*")) / "log.txt"
    log.write_text("date\ndefend: error: no luck\n")
    missing = missing_cells(plan)
    assert len(missing) == 20 - 4 - 2
    assert missing[log.parent.name] == f"not finished: defend: error: no luck ({log})"
    assert set(missing.values()) > {"not begun"}
    log.write_text("date\n")
    assert missing_cells(plan)[log.parent.name] == f"not finished: it has said nothing yet ({log})"


def test_all_files_are_written(partial_results, capsys):
    pytest.importorskip("pandas", reason="pandas is not installed (requirements-tables.txt)")
    from tables.render import render

    render(partial_results)
    folder = partial_results.parent
    text = (folder / "table.md").read_text()
    assert "| ANP | 80.00 / 9.00 (1 of 2) | - |" in text and "ddof = 1" in text
    assert text.endswith("14 of 20 cells are missing: missing.md\n") and "not begun" not in text
    assert (folder / "missing.md").read_text().count("`: not begun\n") == 14
    assert "$\\pm$" in (folder / "table.tex").read_text() and "±" not in (folder / "table.tex").read_text()
    records = (folder / "table.csv").read_text().splitlines()
    assert len(records) == 1 + 3 * 2 and records[3].startswith("ANP,,badnets,measured,1,2,80.0,,9.0,")
    assert (folder / "table.png").read_bytes()[:4] == b"\x89PNG" and (folder / "table.pdf").read_bytes()[:4] == b"%PDF"
    assert "saved" in capsys.readouterr().out
    plan = json.loads(partial_results.read_text())
    finish(plan, plan["cells"], 80, 9)
    render(partial_results)
    assert "missing" not in (folder / "table.md").read_text() and not (folder / "missing.md").exists()


def test_a_damaged_result_is_one_line(partial_results):
    plan = json.loads(partial_results.read_text())
    path = next(Path(plan["folder"]).glob("evaluate*")) / "metrics.json"
    path.write_text('{"metrics": 3}')
    with pytest.raises(InputError, match="no metrics; remove its folder"):
        measured_lines(plan)


@pytest.mark.parametrize(
    "damage",
    [
        lambda plan: {},
        lambda plan: {**plan, "rows": 3},
        lambda plan: {**plan, "rows": [{}]},
        lambda plan: {**plan, "cells": {}},
        lambda plan: {**plan, "cells": dict.fromkeys(plan["cells"], "a")},
        lambda plan: {**plan, "folder": None},
        lambda plan: {**plan, "published": ["nobody"]},
    ],
)
def test_a_damaged_plan_is_one_line(partial_results, capsys, damage):
    from tables.render import main

    partial_results.write_text(json.dumps(damage(json.loads(partial_results.read_text()))))
    assert main([str(partial_results)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tables: error: {partial_results}: not the plan of a table (")
    assert [path.name for path in partial_results.parent.iterdir()] == ["plan.json"]


def test_only_what_is_needed_has_to_be_installed(tmp_path, capsys, monkeypatch):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    rendered = []
    monkeypatch.setattr("tables.render.render", rendered.append)
    there = {"yaml", "pandas", "jinja2"}
    util = SimpleNamespace(find_spec=lambda name: name in there)
    monkeypatch.setattr("tables.__main__.importlib", SimpleNamespace(util=util))
    places = ["--output-dir", str(tmp_path / "out"), "--cells-dir", str(tmp_path / "cells")]
    assert main([str(path), *places]) == 1 and "snakemake is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([str(path), *places, "--render"]) == 0 and rendered == [tmp_path / "out" / "plan.json"]
    there.remove("pandas")
    assert main([str(path), *places, "--render"]) == 1 and "pandas is not installed" in capsys.readouterr().err
    assert main([str(path), *places, "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("others", "cores"),
    [
        (["--jobs", "50"], False),
        (["--jobs=50"], False),
        (["-j50"], False),
        (["-j", "50"], False),
        (["--jobscript", "x"], True),
        ([], True),
    ],
)
def test_snakemake_gets_cores_or_jobs(others, cores):
    command = snakemake(Path("plan.json"), build_parser().parse_args(["x.yaml"]), others)
    assert ("--cores" in command) == cores and command[len(command) - len(others) :] == others


def test_dry_run_prints_the_commands(tmp_path, capsys):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    assert main([str(path), "--dry-run", "--cells-dir", str(tmp_path / "cells")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21 and lines[-1] == "20 of 20 cells are not done yet"
    assert all(each.startswith("python ") for each in lines[:-1]) and not (tmp_path / "cells").exists()
    assert main([str(tmp_path / "none.yaml"), "--dry-run"]) == 1
    assert capsys.readouterr().err == f"tables: error: {tmp_path}/none.yaml: no such file\n"
