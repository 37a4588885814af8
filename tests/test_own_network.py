"""``--model FILE.py:FUNCTION``: networks that the user builds himself."""

import json
import re
import shutil

import pytest
import torch

import evaluate_cifar
import optimize_mask_cifar
import prune_neuron_cifar
import train_backdoor_cifar
from formats.cards import read_card
from formats.checkpoints import read_state_dict
from formats.mask_file import read_masks
from models import ModelConfig
from models.own import build_own
from utils.config import InputCode
from utils.errors import InputError

CODE = """
import torch
from torch import nn

def small(num_classes):
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2), nn.BatchNorm2d(8),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))

def fixed():
    return small(10)

def nine(num_classes):
    return small(9)

def gray(num_classes):
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten())

def lazy(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

def broken(num_classes):
    raise RuntimeError("no luck\\nat all")

def text(num_classes):
    return "network"
"""


@pytest.fixture
def code(tmp_path):
    (tmp_path / "net.py").write_text(CODE)
    return tmp_path / "net.py"


def flags(folder, code, function="small"):
    return ["--output-dir", str(folder), "--model", f"{code}:{function}", "--precision", "fp32"]


def test_three_steps_and_evaluation(code, tmp_path, capsys):
    out = tmp_path / "out"
    assert train_backdoor_cifar.main([*flags(out, code), "--dataset", "tiny", "--epoch", "1"]) == 0
    card = read_card(out / "last_model.th")
    assert card["model"] == "net.py:small" and not {"arch", "widen_factor"} & card.keys()
    source = ["--checkpoint", str(out / "last_model.th"), "--val-frac", "0.1"]
    steps = ["--nb-iter", "2", "--batch-size", "32"]
    assert optimize_mask_cifar.main([*flags(out, code), *source, *steps]) == 0
    masks = ["--mask-file", str(out / "mask_values.txt"), "--number", "3"]
    assert prune_neuron_cifar.main([*flags(out, code), *source, *masks]) == 0
    network = build_own(InputCode(f"{code}:small"), 10)
    assert len(read_masks(out / "mask_values.txt", network)) == 14
    repaired = read_state_dict(out / "repaired_model.th")
    assert sum(int((repaired[name] == 0).sum()) for name in ("1.weight", "4.weight")) == 3
    assert evaluate_cifar.main(["--checkpoint", str(out / "repaired_model.th"), "--model", f"{code}:small"]) == 0
    assert "C-Acc" in capsys.readouterr().out


def test_code_that_a_card_names_is_never_run(code, tmp_path, capsys):
    out = tmp_path / "out"
    assert train_backdoor_cifar.main([*flags(out, code), "--dataset", "tiny", "--epoch", "1"]) == 0
    code.write_text("raise SystemExit('run')")
    assert evaluate_cifar.main(["--checkpoint", str(out / "last_model.th")]) == 1
    assert "--model FILE.py:FUNCTION" in capsys.readouterr().err


def test_a_network_of_the_registry_and_code_contradict_each_other(trained, code, capsys):
    checkpoint = ["--checkpoint", str(trained / "last_model.th"), "--model", f"{code}:small"]
    assert evaluate_cifar.main(checkpoint) == 1
    assert "contradicts the card" in capsys.readouterr().err
    assert evaluate_cifar.main([*checkpoint, "--arch", "resnet18"]) == 1
    assert "leave out --arch" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_backdoor_cifar.main(["--model", f"{code}:small", "--widen-factor", "0.5"])
    assert "leave out --arch and --widen-factor" in capsys.readouterr().err


def test_another_function_or_file_is_another_run(code, tmp_path, capsys):
    out = tmp_path / "out"
    common = ["--dataset", "tiny", "--epoch", "1"]
    assert train_backdoor_cifar.main([*flags(out, code), *common]) == 0
    assert train_backdoor_cifar.main([*flags(out, code, "fixed"), *common, "--resume"]) == 1
    assert "--model is another file than before" in capsys.readouterr().err
    moved = shutil.move(code, tmp_path / "other.py")
    assert train_backdoor_cifar.main([*flags(out, moved), *common, "--resume"]) == 0
    assert "complete" in capsys.readouterr().out


def test_a_function_without_arguments(code):
    assert ModelConfig(model=InputCode(f"{code}:fixed")).build(10)[-1].out_features == 10


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("missing", "the file has no function missing"),
        ("lazy", "a lazy layer has no size yet"),
        ("broken", "line 22: RuntimeError: no luck"),
        ("text", "returned str, expected a torch.nn.Module"),
        ("nine", r"makes \(2, 9\) of two images, expected logits \(2, 10\)"),
        ("gray", "fails on images of 32x32: RuntimeError"),
    ],
)
def test_faults_in_the_code_are_one_line(code, tmp_path, capsys, function, message):
    assert train_backdoor_cifar.main([*flags(tmp_path / "out", code, function), "--dataset", "tiny"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def small(:", "line 1: SyntaxError"),
        (
            "import blocks_of_mine",
            "line 1: ModuleNotFoundError: No module named 'blocks_of_mine'; its folder has to be",
        ),
        (None, "no such file"),
    ],
)
def test_faults_in_the_file(code, content, message):
    code.unlink() if content is None else code.write_text(content)
    with pytest.raises(InputError, match=message):
        build_own(InputCode(f"{code}:small"), 10)


@pytest.mark.parametrize("given", ["net.py", "net:small", ":small", "net.py:", "net.py:a b"])
def test_the_flag_names_file_and_function(given, capsys):
    with pytest.raises(SystemExit):
        train_backdoor_cifar.main(["--model", given])
    assert "expected FILE.py:FUNCTION" in capsys.readouterr().err


def test_memory_of_a_network_that_needs_content_is_not_known(code, tmp_path, capsys):
    code.write_text(
        CODE.replace(
            "def fixed",
            "class Odd(nn.Sequential):\n    def forward(self, x):\n        "
            "return super().forward(x) * float(x.abs().max() > -1)\n\ndef fixed",
        ).replace("return small(10)", "return Odd(*small(10))")
    )
    assert (
        train_backdoor_cifar.main([*flags(tmp_path / "out", code, "fixed"), "--dataset", "tiny", "--epoch", "1"]) == 0
    )
    assert "how much memory this takes is not known: Odd" in capsys.readouterr().out


def test_weights_do_not_depend_on_what_was_drawn_before(code, tmp_path):
    digests = set()
    for name in "ab":
        torch.rand(len(digests) + 1)
        assert train_backdoor_cifar.main([*flags(tmp_path / name, code), "--dataset", "tiny", "--epoch", "1"]) == 0
        digests.add(json.loads((tmp_path / name / "last_model.json").read_text())["sha256"])
    assert len(digests) == 1


def test_a_file_with_a_dataclass(tmp_path):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\n"
    text += "@dataclass\nclass Sizes:\n    width: int = 4\ndef build():\n    return nn.Linear(Sizes().width, 2)\n"
    (tmp_path / "sizes.py").write_text(text)
    assert build_own(InputCode(f"{tmp_path / 'sizes.py'}:build"), 2).in_features == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build():\n    raise RuntimeError('no')\n", r"net\.py:build, line 2: RuntimeError: no"),
        ("import sys\nsys.exit()\n", r"net\.py:build, line 2: SystemExit"),
    ],
)
def test_the_line_that_failed_is_named_whatever_the_path(tmp_path, monkeypatch, text, message):
    (tmp_path / "net.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    for path in ("net.py", "./net.py", str(tmp_path / "net.py")):
        with pytest.raises(InputError, match=message):
            build_own(InputCode(f"{path}:build"), 10)
