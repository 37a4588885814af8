"""The comparison of choices without the trigger: its arithmetic, and that the page shows what is on file."""

import json

import pytest

from benchmarks import trigger_free
from tests.test_structure import ROOT
from tests.test_trigger_free import step_3
from utils.errors import InputError


def row(pruned, threshold, defender, accuracy, asr):
    return {"pruned": pruned, "threshold": threshold, "defender": defender, "C-Acc": accuracy, "ASR": asr}


def result(after=(8, 82.0, 6.5), least=0.5):
    sweep = [
        row(0, None, 90.0, 88.0, 99.0),
        row(0, 0.0, 90.0, 88.0, 99.0),
        row(5, 0.1, 89.0, 87.0, 40.0),
        row(7, 0.2, 88.5, 86.0, 5.0),
        row(9, 0.3, 87.0, 81.0, least),
    ]
    after = dict(zip(("pruned", "C-Acc", "ASR"), after, strict=True))
    found = {"backdoored": True, "suspect": 3, "p_value": 0.01}
    attack = {"poison_type": "badnets", "poison_target": 3}
    return {
        "detection": found,
        "stop": {"abstained": False},
        "sweep": sweep,
        "after": after,
        "attack": attack,
    }


def test_the_oracle_takes_the_best_accuracy_of_those_low_enough():
    assert trigger_free.tolerated(result()) == 5
    assert trigger_free.oracle(result())["C-Acc"] == 86
    assert trigger_free.tolerated(result(least=20.0)) == pytest.approx(6.0)
    high = result(after=(8, 85.0, 30.0), least=30.0)
    high["sweep"][3]["ASR"] = 32.0
    assert trigger_free.tolerated(high) == 31 and trigger_free.oracle(high)["C-Acc"] == 85


def test_choices_that_know_no_asr():
    chosen = {rule: found["pruned"] for rule, found in trigger_free.choices(result()).items()}
    assert chosen == {"without trigger": 8, "threshold 0.2": 7, "1 points": 5, "2 points": 7, "3 points": 9}


def one_of(alone):
    """What the summary says of every other rule for one network."""
    return trigger_free.summary_table({"badnets-t4-s145": alone}).splitlines()[3:]


def test_too_high_an_asr_is_marked_and_costs_nothing():
    results = {"badnets-t4-s145": result(), "benign-s130": result(after=(7, 85.0, 4.0))}
    lines = trigger_free.summary_table(results).splitlines()
    assert lines[2] == "| not in view | without trigger | 1 of 2 | 6.50 (6.50) | 1.00 (1.00) |"
    seen = {**results, "sig-0": result(after=(7, 86.0, 4.0)), "blend-t3-s105": result(after=(7, 86.0, 7.0))}
    assert trigger_free.summary_table(seen).splitlines()[2:] == [
        *lines[2:],
        "| zoo (in view) | without trigger | 0 of 1 | - | 0.00 (0.00) |",
        *(line.replace("not in view", "zoo (in view)") for line in one_of(result())),
        "| others in view | without trigger | 1 of 1 | 7.00 (7.00) | - |",
        *(line.replace("not in view", "others in view") for line in one_of(result())),
    ]
    assert "| 82.00 / 6.50 * | 86.00 / 5.00 |" in trigger_free.repairs_table(results).splitlines()[2]


def test_what_a_run_of_step_3_found_is_kept(trained, tmp_path):
    assert step_3(trained, tmp_path / "run", "--trigger-free", "--trigger-info", f"{trained}/trigger_info.th") == 0
    kept = tmp_path / "kept" / "run.json"
    assert trigger_free.main(["collect", str(tmp_path / "run"), str(kept)]) == 0
    found = json.loads(kept.read_text())
    assert [row["threshold"] for row in found["sweep"]] == [None, 0.0, 0.05, 0.1, 0.15, 0.2]
    assert found["attack"]["poison_type"] == "badnets" and found["after"]["C-Acc"] >= 0
    assert trigger_free.load(kept.parent) == {"run": found}


def test_a_folder_without_a_run(tmp_path, capsys):
    assert trigger_free.main(["collect", str(tmp_path), str(tmp_path / "new" / "x.json")]) == 1
    assert "no such file" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_damaged_files(trained, tmp_path, capsys):
    assert step_3(trained, tmp_path, "--trigger-free", "--trigger-info", f"{trained}/trigger_info.th") == 0
    (tmp_path / "repaired_model.json").write_text('{"repair": {}, "attack": {}}')
    capsys.readouterr()
    assert trigger_free.main(["collect", str(tmp_path), str(tmp_path / "x.json")]) == 1
    assert "repaired_model.json: no card of step 3, it lacks metrics" in capsys.readouterr().err
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text('{"detection": {}, "stop": null, "after": null}')
    with pytest.raises(InputError, match=r"a\.json: no result, it lacks attack, sweep; collect it anew"):
        trigger_free.load(tmp_path / "results")


def test_the_page_shows_what_is_on_file(capsys):
    results = trigger_free.load()
    text = (ROOT / "docs" / "trigger_free.md").read_text()
    assert trigger_free.main(["table"]) == 0
    printed = capsys.readouterr().out
    for table in (trigger_free.repairs_table, trigger_free.summary_table):
        assert table(results) in text and table(results) in printed
