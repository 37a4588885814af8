"""What the detector found in networks of known attack: what is kept, how it is counted, and that the page shows it."""

import json

import pytest
import torch

import detect_cifar
from benchmarks import detection
from defenses.all_to_all import Assignment
from defenses.detection import Detection, DetectionConfig, Statistic
from tests.test_structure import ROOT
from utils.errors import InputError


def result(attack="badnets", asr=99.0, suspect=3, p_value=0.01, **more):
    """Of a network whose target is class 3, if it has one."""
    statistic = {"values": [0.1, 0.2, 0.1, 0.5], "suspect": 3, "p_value": 0.02}
    metrics = {"clean_accuracy": 88.0} | ({} if asr is None else {"attack_success_rate": asr})
    return {
        "backdoored": p_value <= 0.05,
        "suspect": suspect,
        "p_value": p_value,
        "statistics": {"margin": statistic, "noise": statistic},
        "assignment": {"ahead": 0.02, "p_value": 0.3},
        "attack": {"poison_type": attack} | ({"poison_target": 3} if attack == "badnets" else {}),
        "metrics": metrics,
        **more,
    }


def test_a_row_says_what_stands_out():
    lines = detection.networks_table({"x": result(), "y": result("benign", None, 2, 0.4)}).splitlines()
    assert lines[2] == "| `x` | 88.00 / 99.00 | 3: 0.5 (0.02) | 3: 50.0 (0.02) | 2.00 (0.3) | 0.01 | class 3 |"
    none = detection.networks_table({"x": result(assignment=None)}).splitlines()[2]
    assert none == lines[2].replace("2.00 (0.3)", "-")
    small = detection.networks_table({"x": result(p_value=9e-7)}).splitlines()[2]
    assert small == lines[2].replace("| 0.01 |", "| < 1e-6 |")
    assert lines[3] == "| `y` | 88.00 | 3: 0.5 (0.02) | 3: 50.0 (0.02) | 2.00 (0.3) | 0.4 | - |"


def test_counts_of_each_attack():
    """A wrong class is called, but not right; where an attack has not taken hold its network is left out."""
    results = {
        "badnets-0": result(),
        "badnets-1": result(suspect=1),
        "badnets-2": result(p_value=0.3),
        "badnets-all-0": result(asr=49.9),
        "badnets-t2-s101": result("badnets-all", suspect=None),
        "badnets-t3-s109": result("badnets-all", suspect=2),
        "benign-s130": result("benign", None),
        "benign-s131": result("benign", None, p_value=0.06),
        "blend-t9-s144": result("blend", suspect=None),  # whose looks suggested the combination
    }
    assert detection.counts_table(results).splitlines()[2:] == [
        "| BadNets | 2 of 3, 1 right | - | - |",
        "| Blend | - | 1 of 1, 1 right | - |",
        "| BadNets, all-to-all | - | 2 of 2, 1 right | - |",
        "| benign (no backdoor) | - | - | 1 of 2 |",
    ]


def test_what_a_run_found_is_kept(trained, tmp_path):
    """With what it was computed on: figures in bf16 differ from those in fp32."""
    quick = ["--margin-steps", "1", "--margin-images", "1", "--noise-images", "4", "--val-frac", "0.1"]
    where = ["--checkpoint", f"{trained}/last_model.th", "--output-dir", str(tmp_path / "run"), "--precision", "fp32"]
    assert detect_cifar.main([*where, *quick]) == 0
    assert detection.main(["collect", str(tmp_path / "run"), str(tmp_path / "kept" / "x.json")]) == 0
    kept = json.loads((tmp_path / "kept" / "x.json").read_text())
    assert set(kept) == {*detection.FOUND, *detection.REMEMBERED} and kept["runtime"]["precision"] == "torch.float32"


def test_damaged_files(tmp_path, capsys):
    assert detection.main(["collect", str(tmp_path), str(tmp_path / "new" / "x.json")]) == 1
    assert "no such file" in capsys.readouterr().err and not (tmp_path / "new").exists()
    (tmp_path / "detection.json").write_text('{"backdoored": true}')
    assert detection.main(["collect", str(tmp_path), str(tmp_path / "x.json")]) == 1
    assert "detection.json: it lacks assignment, p_value, " in capsys.readouterr().err
    with pytest.raises(InputError, match=r"detection\.json: no result, it lacks assignment, p_value, "):
        detection.load(tmp_path)


def test_a_network_without_a_card(tmp_path):
    kept = dict.fromkeys(detection.FOUND)
    (tmp_path / "nobody.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match=r"results/networks/nobody\.json: no such file"):
        detection.load(tmp_path)


def test_verdicts_on_file_are_those_of_the_statistics_on_file():
    for name, found in detection.load().items():
        statistics = {each: Statistic(**parts) for each, parts in found["statistics"].items()}
        again = Detection.of(statistics, DetectionConfig.level, Assignment(**found["assignment"])).as_dict()
        assert again == {each: found[each] for each in detection.FOUND}, name
        for statistic in statistics.values():
            assert statistic == Statistic.of(torch.tensor(statistic.values)), name


def test_the_page_shows_what_is_on_file(capsys):
    results = detection.load()
    text = (ROOT / "docs" / "detection.md").read_text()
    assert detection.main(["table"]) == 0
    printed = capsys.readouterr().out
    for table in detection.TABLES.values():
        assert table(results) in text and table(results) in printed
    assert {path.name for path in detection.NETWORKS.glob("*.json")} <= {f"{name}.json" for name in results}
