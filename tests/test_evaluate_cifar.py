"""The script that only measures."""

import json
import shutil

import pytest
import torch

import evaluate_cifar
from data.datasets import DATASETS
from data.triggers import attacked_index, triggered_test_set
from engine.evaluation import Evaluator
from formats.trigger_file import load_trigger
from tests.conftest import WIDTH


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "save")


def flags(folder, trigger=True):
    given = ["--checkpoint", f"{folder}/last_model.th", "--precision", "fp32"]
    return [*given, "--trigger-info", f"{folder}/trigger_info.th"] if trigger else given


def test_it_measures_what_the_card_says_and_writes_nothing(folder, capsys):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    metrics = json.loads((folder / "last_model.json").read_text())["metrics"]
    assert evaluate_cifar.main(flags(folder)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        f"C-Acc {metrics['clean_accuracy']:.2f} %, ASR {metrics['attack_success_rate']:.2f} %, R-Acc "
    )
    assert evaluate_cifar.main(flags(folder, trigger=False)) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("ASR not known (no trigger)")
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_robust_accuracy_is_the_true_class_of_triggered_images(folder):
    class Constant(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    dataset, trigger = DATASETS["tiny"](None), load_trigger(folder / "trigger_info.th", 10)
    evaluator = Evaluator(dataset.test, trigger, dataset.normalization, torch.float32, robust=True)
    report = evaluator(Constant())
    others = dataset.test.labels[attacked_index(dataset.test, trigger)]
    assert len(others) == 180 and report.triggered.accuracy == 0
    assert report.robust.accuracy == int((others == 3).sum()) / 180 > 0
    assert torch.equal(evaluator.sets["robust"].images, triggered_test_set(dataset.test, trigger).images)
    assert Evaluator(dataset.test, trigger, dataset.normalization, torch.float32)(Constant()).robust is None


def test_faults_are_one_line(folder, capsys):
    state = torch.load(folder / "last_model.th")
    state["linear.weight"] = torch.full_like(state["linear.weight"], 3e38)
    torch.save(state, folder / "large.th")
    cases = {
        "no such file": ["--checkpoint", f"{folder}/none.th"],
        "look at --mean and --std": ["--checkpoint", f"{folder}/large.th", "--dataset", "tiny", *WIDTH],
        "not a trigger file": [*flags(folder), "--trigger-info", f"{folder}/last_model.th"],
    }
    for message, given in cases.items():
        assert evaluate_cifar.main([*given, "--precision", "fp32"]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and error.startswith("evaluate: error: ")


def test_figures_as_json(folder, capsys):
    path = folder / "figures.json"
    assert evaluate_cifar.main([*flags(folder), "--json", str(path)]) == 0
    found, card = json.loads(path.read_text()), json.loads((folder / "last_model.json").read_text())
    assert {name: found["metrics"][name] for name in card["metrics"]} == card["metrics"]
    assert found["metrics"].keys() == {"clean_accuracy", "attack_success_rate", "robust_accuracy"}
    assert found["checkpoint_sha256"] == card["sha256"] and found["command"].endswith(f"--json {path}")
    assert evaluate_cifar.main([*flags(folder, trigger=False), "--json", str(path)]) == 0
    assert json.loads(path.read_text())["metrics"].keys() == {"clean_accuracy"}, "its own file is replaced"


@pytest.mark.parametrize(
    ("name", "message"),
    [("last_model.json", "holds no figures"), ("last_model.th", "not a UTF-8 text"), ("none/f.json", "no folder")],
)
def test_the_json_file_replaces_no_other(folder, name, message, capsys):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert evaluate_cifar.main([*flags(folder), "--json", f"{folder}/{name}"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_no_flag_of_the_split(capsys):
    with pytest.raises(SystemExit):
        evaluate_cifar.main(["--checkpoint", "x", "--split-file", "y"])
    assert "unrecognized arguments: --split-file" in capsys.readouterr().err
