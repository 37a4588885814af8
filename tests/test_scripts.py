"""The three scripts end to end: results, flags, resume, kill, locks, errors."""

import argparse
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch

import defenses.anp as anp
import optimize_mask_cifar as optimize
import prune_neuron_cifar as prune
import train_backdoor_cifar as train
from attacks import BadNets
from data.datasets import DATASETS, Normalization
from data.split import draw_permutation
from defenses.anp import AnpConfig
from engine.evaluation import Metrics, Report
from engine.runtime import Runtime
from engine.training import TrainConfig
from formats.mask_file import write_masks
from formats.outputs import OUTPUTS
from formats.subject import load_subject
from formats.trigger_file import save_trigger
from models import Neuron, build_model
from models.neuron_layers import neuron_layers
from tests.conftest import WIDTH
from tests.small import interrupt_after
from utils.errors import InputError
from utils.files import sha256_of

ROOT = Path(__file__).parents[1]
FP32 = ["--precision", "fp32"]
MASKS = ["--val-frac", "0.1", "--nb-iter", "6", "--print-every", "3", "--batch-size", "32"]


def source(folder):
    return ["--checkpoint", f"{folder}/last_model.th", "--trigger-info", f"{folder}/trigger_info.th"]


def rows(folder, step):
    record, *lines = map(json.loads, (folder / f"{step}_log.jsonl").read_text().splitlines())
    return record["record"], lines


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the output of steps 1 and 2, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "save"))


# ---- the whole path


@pytest.fixture(scope="module")
def repaired(tmp_path_factory):
    """The three steps on 4,000 synthetic images, long enough that the backdoor is there and goes."""
    folder = tmp_path_factory.mktemp("repaired")
    out = ["--output-dir", str(folder), "--threads", "1"]
    trained = ["--dataset", "small", "--epoch", "20", "--batch-size", "48", "--poison-rate", "0.2"]
    assert train.main([*out, *WIDTH, *trained, "--lr-schedule", "one-cycle"]) == 0
    masks = ["--val-frac", "0.1", "--nb-iter", "300", "--print-every", "300", "--batch-size", "96"]
    assert optimize.main([*out, *source(folder), *masks]) == 0
    pruning = ["--mask-file", f"{folder}/mask_values.txt", "--val-frac", "0.1", "--max-acc-drop", "4"]
    assert prune.main([*out, *source(folder), *pruning]) == 0
    return folder


@pytest.mark.slow
def test_the_backdoor_is_there_and_goes(repaired):
    before = json.loads((repaired / "last_model.json").read_text())["metrics"]
    after = json.loads((repaired / "repaired_model.json").read_text())["metrics"]
    assert before["clean_accuracy"] > 85 and before["attack_success_rate"] > 95
    assert after["attack_success_rate"] < 10
    assert after["clean_accuracy"] > before["clean_accuracy"] - 10


@pytest.fixture(scope="module")
def pruned(trained, tmp_path_factory):
    """The three steps, too short to mean anything; all neurons are pruned."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("pruned") / "save"))
    options = ["--mask-file", f"{folder}/mask_values.txt", "--val-frac", "0.1", "--threshold", "1"]
    assert prune.main(["--output-dir", str(folder), *source(folder), *options]) == 0
    return folder


def test_what_lies_in_the_folder(pruned):
    names = {path.name for path in pruned.iterdir()}
    assert names >= {
        "last_model.th", "last_model.json", "model_init.th", "trigger_info.th", "train_log.jsonl", "train_curves.png",
        "clean_and_triggered.png", "mask_values.txt", "mask_values.png", "optimize_log.jsonl", "repaired_model.th",
        "repaired_model.json", "pruning_by_threshold.txt", "pruning_by_threshold.png", "pruning_by_threshold_log.jsonl",
    }  # fmt: skip
    assert not {name for name in names if "resume" in name or name.endswith(".part")}
    known = [pattern for step in ("train", "optimize", "pruning_by_threshold") for pattern in OUTPUTS[step].files]
    files = {path.name for path in pruned.iterdir() if path.is_file()}
    strange = {name for name in files if not any(re.fullmatch(pattern, name) for pattern in known)}
    assert strange == {".lock"}, "what no pattern names would survive --overwrite"
    assert all((pruned / name).read_bytes()[:4] == b"\x89PNG" for name in names if name.endswith(".png"))
    for picture in ("train_curves", "clean_and_triggered", "mask_values", "pruning_by_threshold"):
        assert (pruned / f"{picture}.pdf").read_bytes()[:5] == b"%PDF-"


def test_the_repaired_network_is_a_plain_checkpoint(pruned):
    network = build_model("resnet18", 10, 0.125)
    network.load_state_dict(torch.load(pruned / "repaired_model.th"))
    card = json.loads((pruned / "repaired_model.json").read_text())
    zeros = sum(int((m.weight == 0).sum()) for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert zeros == card["repair"]["pruned_neurons"] > 0
    again = ["--output-dir", str(pruned / "again"), "--checkpoint", str(pruned / "repaired_model.th")]
    assert optimize.main([*again, "--val-frac", "0.1", "--nb-iter", "1"]) == 0


# ---- step 1


def test_checkpoints_and_schedule(tmp_path):
    args = ["--output-dir", str(tmp_path), *WIDTH, "--dataset", "tiny", "--epoch", "4", "--schedule", "1", "3"]
    assert train.main([*args, "--save-every", "2", "--poison-type", "benign"]) == 0
    record, epochs = rows(tmp_path, "train")
    assert [row["epoch"] for row in epochs] == [1, 2, 3, 4], "as many epochs as --epoch says"
    assert [row["lr"] for row in epochs] == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert [row["ASR %"] for row in epochs] == [None] * 4
    assert record["ended"] and record["command"].startswith("python train_backdoor_cifar.py --output-dir")
    assert sorted(path.name for path in tmp_path.glob("*.th")) == [
        "last_model.th", "model_2.th", "model_4.th", "model_init.th"]  # fmt: skip
    assert (tmp_path / "last_model.th").read_bytes() == (tmp_path / "model_4.th").read_bytes()
    card = json.loads((tmp_path / "last_model.json").read_text())
    assert card["attack"] == {"poison_type": "benign"} and card["epochs"] == 4 and card["seed"] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--poison-type", "benign", "--poison-rate", "0.1"], "--poison-rate has no effect"),
        (["--poison-type", "benign", "--trigger-alpha", "0.1"], "--trigger-alpha has no effect"),
        (["--poison-type", "clean-label"], "needs either --clb-surrogate FILE"),
        (["--poison-type", "clean-label", "--clb-dir", "x", "--clb-surrogate", "y"], "needs either --clb-surrogate"),
        (["--poison-type", "clean-label", "--clb-dir", "x", "--poison-rate", "0.1"], "--poison-rate has no effect"),
        (["--poison-type", "clean-label", "--clb-dir", "x", "--clb-steps", "9"], "--clb-steps has no effect"),
        (["--poison-type", "folder"], "needs --poisoned-dir"),
        (["--poison-type", "badnets-all", "--poison-target", "1"], "--poison-target has no effect"),
        (["--sig-delta", "30"], "--sig-delta has no effect with --poison-type badnets"),
        (["--poison-type", "sig", "--sig-delta", "300"], "out of range"),
        (["--poison-type", "iab-one", "--schedule", "3"], "--schedule has no effect with --poison-type iab-one"),
        (["--poison-type", "iab-one", "--epoch", "1"], "use 2 or more"),
        (["--poison-type", "folder", "--poisoned-dir", "x", "--export-poisoned", "y"], "no set to export"),
        (["--poison-type", "iab-all", "--export-poisoned", "x"], "no set to export"),
        (["--clb-dir", "x"], "--clb-dir has no effect"),
        (["--lr-schedule", "one-cycle", "--schedule", "3"], "--schedule has no effect"),
        (["--poison-rate", "1.5"], "out of range"),
        (["--poison-rate", "0"], "out of range"),
        (["--trigger-alpha", "nan"], "out of range"),
        (["--widen-factor", "inf"], "out of range"),
        (["--device", "meta"], "none of auto, cpu, cuda"),
        (["--resume", "--overwrite"], "not allowed with"),
        (["--std", "1", "1", "1"], "unrecognized arguments"),
        (["--epoch", "0"], "out of range"),
        (["--batch-size", "x"], "invalid whole number"),
        (["--arch", "alexnet"], "invalid choice"),
        (["--epo", "3"], "unrecognized arguments"),
    ],
)
def test_bad_flags_of_step_1(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(flags)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def failure(capsys, script, args):
    """Run a script that must fail; return its one line."""
    capsys.readouterr()
    assert script.main(args) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


def test_target_out_of_range(tmp_path, capsys):
    args = ["--output-dir", str(tmp_path / "x"), "--dataset", "tiny", *WIDTH, "--poison-target", "99"]
    assert "--poison-target 99" in failure(capsys, train, args)


def test_unwritable_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error = failure(capsys, train, ["--output-dir", str(tmp_path / "file" / "x"), "--dataset", "tiny"])
    assert "file" in error


def test_an_older_training_is_not_lost_by_accident(folder, capsys):
    args = ["--output-dir", str(folder), "--dataset", "tiny", *WIDTH, "--epoch", "1", "--poison-type", "benign"]
    before = (folder / "last_model.th").read_bytes()
    assert "--overwrite" in failure(capsys, train, args)
    assert (folder / "last_model.th").read_bytes() == before
    (folder / "model_20.th").write_text("of a longer run")
    assert train.main([*args, "--overwrite"]) == 0
    assert not (folder / "model_20.th").exists() and not (folder / "trigger_info.th").exists()
    assert (folder / "last_model.th").read_bytes() != before


def test_a_training_that_diverges_says_so(tmp_path, capsys):
    args = ["--output-dir", str(tmp_path), "--dataset", "tiny", *WIDTH, "--epoch", "1", "--lr", "1e20"]
    assert "it diverged; train it with a lower --lr" in failure(capsys, train, args)
    assert not (tmp_path / "last_model.th").exists()


# ---- steps 2 and 3


def test_first_row_and_rows_of_step_2(trained):
    _, table = rows(trained, "optimize")
    assert [row["iteration"] for row in table] == [0, 2, 4]
    card = json.loads((trained / "last_model.json").read_text())["metrics"]
    assert table[0]["C-Acc %"] == pytest.approx(card["clean_accuracy"])
    assert table[0]["ASR %"] == pytest.approx(card["attack_success_rate"], abs=0.01)
    assert len((trained / "mask_values.txt").read_text().splitlines()) == 601


@pytest.mark.parametrize("iterations", [1, 5])
def test_as_many_iterations_as_asked(folder, iterations):
    args = ["--output-dir", str(folder), *source(folder), "--val-frac", "0.1", "--batch-size", "16"]
    assert optimize.main([*args, "--nb-iter", str(iterations), "--overwrite"]) == 0
    assert rows(folder, "optimize")[1][-1]["iteration"] == iterations


def test_without_a_trigger_file(folder, capsys):
    checkpoint = ["--checkpoint", f"{folder}/last_model.th", "--output-dir", str(folder)]
    assert optimize.main([*checkpoint, *MASKS, "--overwrite"]) == 0
    assert "clean accuracy only" in capsys.readouterr().out
    pruning = ["--mask-file", f"{folder}/mask_values.txt", "--val-frac", "0.1", "--pruning-max", "0.1"]
    assert prune.main([*checkpoint, *pruning]) == 0
    out = capsys.readouterr().out
    assert "clean accuracy only" in out and "ASR not known" in out
    for step in ("optimize", "pruning_by_threshold"):
        assert {row["ASR %"] for row in rows(folder, step)[1]} == {None}
    assert "attack_success_rate" not in json.loads((folder / "repaired_model.json").read_text())["metrics"]


def test_a_network_without_a_card(folder, capsys):
    (folder / "last_model.json").unlink()
    args = ["--output-dir", str(folder), *source(folder), *MASKS, "--overwrite"]
    assert "--widen-factor" in failure(capsys, optimize, [*args, "--dataset", "tiny", "--widen-factor", "0.25"])
    assert optimize.main([*args, "--dataset", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "no card" in out and "std (0.25, 0.25, 0.25)" in out and "width 0.125 (recognised)" in out
    assert optimize.main([*args, *WIDTH, "--dataset", "tiny", "--std", "0.247", "0.243", "0.261"]) == 0
    assert "std (0.247, 0.243, 0.261)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags",
    [["--arch", "vgg19_bn"], ["--widen-factor", "1"], ["--dataset", "small"], ["--std", "0.2", "0.2", "0.2"]],
)
def test_a_flag_against_the_card(folder, flags, capsys):
    error = failure(capsys, optimize, ["--output-dir", str(folder / "out"), *source(folder), *MASKS, *flags])
    assert f"{flags[0]}" in error and "contradicts the card" in error


def test_another_split_than_the_cards(folder, tmp_path, capsys):
    (tmp_path / "split.txt").write_text("\n".join(map(str, range(600))))
    split = ["--split-file", str(tmp_path / "split.txt")]
    error = failure(capsys, optimize, ["--output-dir", str(folder / "out"), *source(folder), *MASKS, *split])
    assert "not the split" in error


def test_split_file_of_step_1_is_found_again(tmp_path):
    (tmp_path / "split.txt").write_text("\n".join(map(str, reversed(range(600)))))
    out = ["--output-dir", str(tmp_path)]
    split = ["--split-file", str(tmp_path / "split.txt")]
    assert train.main([*out, *WIDTH, *split, "--dataset", "tiny", "--epoch", "1"]) == 0
    assert optimize.main([*out, *source(tmp_path), *MASKS]) == 0
    assert torch.load(tmp_path / "trigger_info.th")["data_index"].max() < 540  # the last 60 are the defender's


def test_bad_files_of_steps_2_and_3(folder, capsys):
    out = ["--output-dir", str(folder / "out")]
    masks = ["--mask-file", f"{folder}/mask_values.txt", "--val-frac", "0.1"]
    missing = ["--checkpoint", f"{folder}/none.th"]
    assert "no such file" in failure(capsys, optimize, [*out, *missing, *MASKS])
    assert "no such file" in failure(capsys, prune, [*out, *missing, *masks])
    assert "not a trigger file" in failure(
        capsys, optimize, [*out, "--checkpoint", f"{folder}/last_model.th", "--trigger-info", f"{folder}/last_model.th"]
    )
    assert "no state_dict" in failure(capsys, optimize, [*out, "--checkpoint", f"{folder}/trigger_info.th"])
    lines = (folder / "mask_values.txt").read_text().splitlines(keepends=True)
    (folder / "mask_values.txt").write_text("".join(lines[:-10]))
    assert "damaged or replaced" in failure(capsys, prune, [*out, *source(folder), *masks])
    (folder / "mask_values.json").unlink()  # as with a file of another toolkit
    assert "590 neurons, but the network has 600" in failure(capsys, prune, [*out, *source(folder), *masks])
    state = torch.load(folder / "last_model.th")
    state["bn1.weight"][0] = float("nan")
    torch.save(state, folder / "nan.th")
    nan = [*out, "--checkpoint", f"{folder}/nan.th", *WIDTH, "--dataset", "tiny"]
    assert "bn1.weight holds 1 values that are NaN" in failure(capsys, optimize, nan)
    assert {path.name for path in (folder / "out").iterdir()} <= {".lock"}


def test_masks_of_another_checkpoint(folder, capsys):
    other = ["--output-dir", str(folder / "other")]
    assert train.main([*other, "--dataset", "tiny", *WIDTH, "--epoch", "1", "--seed", "1"]) == 0
    masks = ["--mask-file", f"{folder}/mask_values.txt", "--val-frac", "0.1"]
    assert "another checkpoint" in failure(capsys, prune, [*other, *source(folder / "other"), *masks])


def test_a_pending_row_is_measured_with_the_saved_masks(folder, monkeypatch):
    """Interrupted while a row was measured, a resumed run measures it with the masks of that iteration."""
    from utils.signals import Interrupted

    args = ["--output-dir", str(folder), *source(folder), *MASKS, *FP32, "--lr", "20"]
    original, calls = anp.apply_masks, []

    def interrupt_second(network, noisy):
        calls.append(noisy.bn1.mask.clone())
        if len(calls) == 2:
            raise Interrupted
        return original(network, noisy)

    monkeypatch.setattr(anp, "apply_masks", interrupt_second)
    assert optimize.main([*args, "--overwrite"]) == 130
    assert optimize.main([*args, "--resume"]) == 0
    assert [row["iteration"] for row in rows(folder, "optimize")[1]] == [0, 3, 6]
    assert torch.equal(calls[1], calls[2]) and calls[2].min() < 0.99


@pytest.fixture
def checkpoint(tmp_path, network):
    """A network that nobody trained, without a card, and the flags that describe it."""
    torch.save(network.state_dict(), tmp_path / "network.th")
    flags = ["--widen-factor", str(1 / 16), "--dataset", "tiny", "--output-dir", str(tmp_path / "out")]
    return ["--checkpoint", str(tmp_path / "network.th"), *flags]


def subject_of(*flags):
    return load_subject(optimize.build_parser().parse_args(flags), Runtime(torch.device("cpu"), torch.float32))


def test_the_defender_holds_the_images_that_the_attacker_never_saw(checkpoint):
    subject, evaluator = subject_of(*checkpoint, "--val-frac", "0.1")
    dataset, permutation = DATASETS["tiny"](None), draw_permutation(600)
    for held in (subject.clean, evaluator.sets["defender"]):
        assert torch.equal(held.images, dataset.train.images[permutation[:60]])
        assert torch.equal(held.labels, dataset.train.labels[permutation[:60]])
    assert torch.equal(evaluator.sets["clean"].images, dataset.test.images)
    assert evaluator.sets["triggered"] is None and not subject.network.training


@pytest.mark.parametrize("val_frac", ["0.1", "0.05"])
def test_images_held_out_of_step_2_judge_step_3(checkpoint, tmp_path, val_frac):
    """Step 3 takes what the masks' card says, without a flag."""
    dataset, permutation = DATASETS["tiny"](None), draw_permutation(600)
    count, kept = (60, 48) if val_frac == "0.1" else (30, 24)
    flags = [*checkpoint, "--val-frac", val_frac]
    source = optimize.build_parser().parse_args([*flags, "--val-split", "0.2"])
    subject, evaluator = load_subject(source, Runtime(torch.device("cpu"), torch.float32), held_out=source.val_split)
    assert torch.equal(subject.clean.images, dataset.train.images[permutation[:kept]])
    for held in (subject.held_out, subject.judging, evaluator.sets["defender"]):
        assert torch.equal(held.images, dataset.train.images[permutation[kept:count]])
    masks = ["--nb-iter", "2", "--batch-size", "16", "--print-every", "2"]
    assert optimize.main([*flags, "--val-split", "0.2", *masks]) == 0
    assert rows(tmp_path / "out", "optimize")
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        load = prune.load_subject
        patch.setattr(prune, "load_subject", lambda *given: seen.append(load(*given)) or seen[0])
        step_3 = [*flags, "--mask-file", f"{tmp_path}/out/mask_values.txt", "--pruning-max", "0"]
        assert prune.main(step_3) == 0
    assert torch.equal(seen[0][1].sets["defender"].images, dataset.train.images[permutation[kept:count]])
    assert len(seen[0][0].clean) == kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val-frac", "0.1", "--val-split", "0.5"], "learnt with --val-split 0.2, not 0.5"),
        (["--val-frac", "0.05"], "learnt with --val-frac 0.1, not 0.05"),
    ],
)
def test_masks_that_have_seen_other_images(checkpoint, tmp_path, network, flags, message, capsys):
    names = [(name, index) for name, layer in neuron_layers(network).items() for index in range(layer.num_features)]
    masks = tmp_path / "masks.txt"
    neurons = [Neuron(*name, 0.5) for name in names]
    write_masks(masks, neurons, sha256_of(checkpoint[1]), {"val_frac": 0.1, "val_split": 0.2})
    assert prune.main([*checkpoint, "--mask-file", str(masks), *flags]) == 1
    assert message in capsys.readouterr().err


def test_too_few_images_to_hold_some_out(checkpoint, capsys):
    assert optimize.main([*checkpoint, "--val-frac", "0.01", "--val-split", "0.2"]) == 1
    assert "--val-split 0.2 of 6 clean images holds 1 out; 2 are needed" in capsys.readouterr().err


def test_the_attacker_holds_all_other_images(tmp_path):
    args, *_ = train.parse_arguments(["--dataset", "tiny", "--output-dir", str(tmp_path)])
    run = argparse.Namespace(folder=tmp_path, overwriting=False, track=None, rely_on=lambda facts: None)
    workspace = train.open_workspace(args, run, Runtime(torch.device("cpu"), torch.float32))
    assert torch.equal(workspace.held, draw_permutation(600)[60:])
    assert torch.equal(workspace.train.images, DATASETS["tiny"](None).train.images[workspace.held])


def test_the_normalisation_is_the_flags_else_the_cards_else_the_datasets(checkpoint, tmp_path):
    own = DATASETS["tiny"](None).normalization
    given, carded = Normalization(own.mean, (0.1, 0.2, 0.3)), Normalization((0.4, 0.5, 0.6), (0.3, 0.2, 0.1))

    def check(expected, *flags):
        subject, evaluator = subject_of(*checkpoint, "--val-frac", "0.1", *flags)
        assert subject.normalization == evaluator.normalization == expected

    check(own)
    check(given, "--std", "0.1", "0.2", "0.3")
    card = {"card_version": 1, "sha256": sha256_of(tmp_path / "network.th"), "normalization": vars(carded)}
    (tmp_path / "network.json").write_text(json.dumps(card))
    check(carded)


@pytest.mark.parametrize("flip", [True, False])
def test_whether_images_are_mirrored_is_what_the_dataset_says(checkpoint, monkeypatch, flip):
    dataset = dataclasses.replace(DATASETS["tiny"](None), flip=flip)
    monkeypatch.setitem(DATASETS, "tiny", lambda root: dataset)
    assert subject_of(*checkpoint, "--val-frac", "0.1")[0].flip == flip
    seen = []
    monkeypatch.setattr("engine.training.make_transform", lambda normalization, flip: seen.append(flip))
    BadNets().make_loop(build_model("resnet18", 10, 1 / 16), BadNets().poison(dataset.train), dataset, TrainConfig())
    assert seen == [flip]


def test_the_asr_is_measured_with_the_trigger_file(checkpoint, tmp_path):
    poisoned = BadNets(poison_target=3).poison(DATASETS["tiny"](None).train)
    save_trigger(tmp_path / "trigger_info.th", poisoned.trigger, poisoned.index)
    _, evaluator = subject_of(*checkpoint, "--val-frac", "0.1", "--trigger-info", str(tmp_path / "trigger_info.th"))
    test = DATASETS["tiny"](None).test
    triggered = evaluator.sets["triggered"]
    assert len(triggered) == 180 and (triggered.labels == 3).all()
    assert torch.equal(triggered.images, poisoned.trigger.stamp(test.images[test.labels != 3]))


ANP_FLAGS = {
    "--lr": ("lr", 0.5), "--nb-iter": ("iterations", 7), "--batch-size": ("batch_size", 9), "--anp-eps": ("eps", 0.6),
    "--anp-steps": ("steps", 3), "--anp-alpha": ("alpha", 0.9), "--seed": ("seed", 11),
}  # fmt: skip


def test_every_flag_of_step_2_reaches_its_setting(checkpoint, monkeypatch):
    seen = []

    def stop(subject, config, row_every):
        seen.append((config, row_every))
        raise InputError("far enough")

    monkeypatch.setattr(optimize, "MaskLoop", stop)
    flags = [text for flag, (_, value) in ANP_FLAGS.items() for text in (flag, str(value))]
    for given in ([], [*flags, "--anp-project", "--print-every", "5"]):
        assert optimize.main([*checkpoint, "--precision", "bf16", "--val-frac", "0.1", *given]) == 1
    settings = dict(ANP_FLAGS.values())
    bf16 = torch.bfloat16
    assert seen == [([AnpConfig(precision=bf16)], 500), ([AnpConfig(**settings, project=True, precision=bf16)], 5)]


def test_every_flag_of_step_1_reaches_its_setting():
    flags = "--epoch 7 --batch-size 9 --lr 0.5 --schedule 2 3 --seed 11 --poison-rate 0.3 --poison-target 4"
    _, attack, config = train.parse_arguments([*flags.split(), "--trigger-alpha", "0.6"])
    assert config == TrainConfig(epochs=7, batch_size=9, lr=0.5, milestones=(2, 3), seed=11)
    assert attack == BadNets(poison_target=4, poison_rate=0.3, trigger_alpha=0.6)


@pytest.mark.parametrize(
    ("choice", "pruned"), [([], 120), (["--threshold", "0.3"], 180), (["--max-acc-drop", "2"], 240)]
)
def test_the_operating_point_follows_the_defenders_accuracy_alone(
    checkpoint, tmp_path, network, monkeypatch, choice, pruned
):
    """On the test set 60 neurons would be the most to prune, and for the ASR all 300."""
    names = [(name, index) for name, layer in neuron_layers(network).items() for index in range(layer.num_features)]
    neurons = [Neuron(*name, number // 60 / 10 + 0.1) for number, name in enumerate(names)]
    write_masks(tmp_path / "masks.txt", neurons, sha256_of(checkpoint[1]))

    def evaluate(network):
        count = sum(int((layer.weight == 0).sum()) for layer in neuron_layers(network).values())
        return Report(
            clean=Metrics(1.0, 0.9 if count <= 60 else 0.1),
            triggered=Metrics(1.0, 0.9 - count / 1000),
            defender=Metrics(1.0, 0.9 if count <= 240 else 0.1),
        )

    evaluate.largest = evaluate.batch_size = 200
    load = prune.load_subject
    monkeypatch.setattr(prune, "load_subject", lambda *given: (load(*given)[0], evaluate))
    assert prune.main([*checkpoint, "--val-frac", "0.1", "--mask-file", str(tmp_path / "masks.txt"), *choice]) == 0
    card = json.loads((tmp_path / "out" / "repaired_model.json").read_text())
    assert card["repair"]["pruned_neurons"] == pruned
    assert card["metrics"]["attack_success_rate"] == pytest.approx(90 - pruned / 10)
    state = torch.load(tmp_path / "out" / "repaired_model.th")
    assert [int(state[f"{n.layer}.weight"][n.index] == 0) for n in neurons] == [1] * pruned + [0] * (300 - pruned)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pruning-max", "1.5"], "--pruning-by number"),
        (["--pruning-by", "number", "--pruning-step", "0.5"], "whole neurons"),
        (["--pruning-by", "number", "--pruning-max", "10.5"], "whole neurons"),
        (["--pruning-step", "0"], "out of range"),
        (["--pruning-step", "1e-9"], "4 decimals"),
        (["--std", "0", "0", "0"], "out of range"),
        (["--seed", "1"], "unrecognized arguments"),
        (["--resume", "--overwrite"], "not allowed with"),
        (["--threshold", "0.2", "--max-acc-drop", "1"], "not allowed with"),
        (["--val-frac", "0.2"], "out of range"),
        (["--val-frac", "0"], "out of range"),
    ],
)
def test_bad_flags_of_step_3(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        prune.main(["--mask-file", "m", "--checkpoint", "c", *flags])
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--anp-steps", "0"], ["--anp-alpha", "2"], ["--anp-eps", "-1"], ["--nb-iter", "0"]])
def test_bad_flags_of_step_2(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        optimize.main(["--checkpoint", "c", *flags])
    assert caught.value.code == 2 and "out of range" in capsys.readouterr().err


def test_sweep_by_number_reaches_the_last_neuron(folder):
    args = ["--output-dir", str(folder), *source(folder), "--mask-file", f"{folder}/mask_values.txt"]
    assert prune.main([*args, "--val-frac", "0.1", "--pruning-by", "number", "--pruning-step", "250"]) == 0
    assert [row["pruned"] for row in rows(folder, "pruning_by_number")[1]] == [0, 250, 500]
    assert (
        prune.main([*args, "--val-frac", "0.1", "--pruning-by", "number", "--pruning-step", "300", "--overwrite"]) == 0
    )
    lines = (folder / "pruning_by_number.txt").read_text().splitlines()
    assert [line.split(" \t ")[0] for line in lines] == ["No", "0", "300", "600"]
    assert all(line.count("\t") == 7 for line in lines)


def test_thresholds_in_the_file(folder):
    args = ["--output-dir", str(folder), *source(folder), "--mask-file", f"{folder}/mask_values.txt"]
    assert prune.main([*args, "--val-frac", "0.1", "--pruning-max", "0.2", "--pruning-step", "0.1"]) == 0
    lines = (folder / "pruning_by_threshold.txt").read_text().splitlines()
    assert [line.split(" \t ")[3] for line in lines] == ["Mask", "None", "0.0", "0.1", "0.2"]


def test_what_the_pictures_of_steps_2_and_3_show(checkpoint, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(optimize, "plot_masks", lambda path, neurons, threshold: given.update(threshold=threshold))
    monkeypatch.setattr(prune, "plot_sweep", lambda path, *rest: given.update(sweep=rest))
    common, masks = [*checkpoint, "--val-frac", "0.1"], str(tmp_path / "out" / "mask_values.txt")
    assert optimize.main([*common, "--nb-iter", "1"]) == 0
    assert prune.main([*common, "--mask-file", masks, "--pruning-max", "0.1", "--threshold", "1"]) == 0
    assert given["threshold"] == 0.2, "the paper's"
    sweep, by, chosen = given["sweep"]
    assert [row["mask"] for row in sweep] == [None, 0, 0.05, 0.1] and by == "threshold"
    assert (chosen["mask"], chosen["pruned %"]) == (1, 100), "not a point of the sweep"
    metrics = json.loads((tmp_path / "out" / "repaired_model.json").read_text())["metrics"]
    assert chosen["C-Acc %"] == pytest.approx(metrics["clean_accuracy"], abs=0.01)
    assert chosen["defender acc %"] == pytest.approx(metrics["defender_accuracy"], abs=0.01)


# ---- repeating, interrupting, killing


def run(step, *args, **options):
    command = [sys.executable, "-m", "tests.small", step, *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def wait_for(path, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


TRAIN = ["--dataset", "tiny", *WIDTH, *FP32, "--threads", 1, "--epoch", 3, "--batch-size", 32]
THREADS = ["--threads", 1]


def arguments(step, folder, into):
    if step == "train":
        return [step, "--output-dir", into, *TRAIN]
    return [step, "--output-dir", into, *source(folder), *MASKS, *FP32, *THREADS, "--nb-iter", 30]


SCRIPTS = {"train": train, "optimize": optimize}
RESULTS = {"train": ["last_model.th", "model_init.th", "trigger_info.th"], "optimize": ["mask_values.txt"]}


@pytest.fixture(scope="module")
def uninterrupted(trained, tmp_path_factory):
    """What both steps give when nothing happens; the same arguments as in the tests below."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for step in RESULTS:
        process = run(*arguments(step, trained, folder))
        assert process.wait() == 0, process.communicate()
    return {name: (folder / name).read_bytes() for names in RESULTS.values() for name in names}


def command(step, folder, into, *flags):
    return [*map(str, arguments(step, folder, into)[1:]), *map(str, flags)]


def carry_out(step, *given):
    return SCRIPTS[step].main(command(step, *given))


@pytest.mark.parametrize(
    ("step", "length", "interruptions"),
    [("train", ["--epoch", 2], (3, 20)), ("optimize", ["--nb-iter", 10], (2, 5))],  # in 2 times 17 batches
)
def test_interrupted_anywhere_a_run_ends_bit_identical(
    step, length, interruptions, trained, tmp_path, monkeypatch, capsys
):
    assert carry_out(step, trained, tmp_path / "whole", *length) == 0
    for steps, resume in zip(interruptions, ([], ["--resume"]), strict=True):
        with monkeypatch.context() as patch:
            interrupt_after(patch, steps)
            assert carry_out(step, trained, tmp_path / "parts", *length, *resume) == 130
        assert re.fullmatch(rf"{step}: interrupted; continue with --resume .*\n", capsys.readouterr().err)
    assert "add --resume" in failure(capsys, SCRIPTS[step], command(step, trained, tmp_path / "parts", *length))
    assert carry_out(step, trained, tmp_path / "parts", *length, "--resume") == 0
    for name in RESULTS[step]:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    (_, whole), (_, parts) = rows(tmp_path / "whole", step), rows(tmp_path / "parts", step)
    assert [{**row, "seconds": 0} for row in parts] == [{**row, "seconds": 0} for row in whole]


@pytest.mark.parametrize(
    ("step", "name", "length"),
    [("train", "model_init.th", ["--epoch", 1]), ("optimize", "mask_values.txt", ["--nb-iter", 2])],
)
def test_the_seed_decides(step, name, length, trained, tmp_path):
    contents = []
    for number, seed in enumerate((0, 0, 1)):
        assert carry_out(step, trained, tmp_path / str(number), *length, "--seed", seed) == 0
        contents.append((tmp_path / str(number) / name).read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_a_folder_in_use_is_refused(trained, tmp_path, capsys):
    with filelock.FileLock(tmp_path / ".lock"):
        assert "another process works in this folder" in failure(
            capsys, optimize, command("optimize", trained, tmp_path)
        )
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


@pytest.mark.slow
@pytest.mark.parametrize("step", RESULTS)
def test_same_seed_same_bytes(step, trained, tmp_path, uninterrupted):
    process = run(*arguments(step, trained, tmp_path))
    assert process.wait() == 0
    for name in RESULTS[step]:
        assert (tmp_path / name).read_bytes() == uninterrupted[name]


@pytest.mark.slow
@pytest.mark.parametrize("step", RESULTS)
def test_killed_again_and_again_ends_bit_identical(step, trained, tmp_path, uninterrupted):
    command, kills = arguments(step, trained, tmp_path), 0
    state = tmp_path / f"{step}_resume.th"
    for delay in (0.0, 0.25, 0.4):
        process = run(*command, "--resume")
        seen = state.stat().st_mtime_ns if state.exists() else 0
        while process.poll() is None and (not state.exists() or state.stat().st_mtime_ns == seen):
            time.sleep(0.005)
        time.sleep(delay)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    process = run(*command, "--resume")
    assert process.wait() == 0, process.communicate()
    assert kills
    for name in RESULTS[step]:
        assert (tmp_path / name).read_bytes() == uninterrupted[name], name
    assert not state.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_in_one_line_and_resumes(number, tmp_path, trained, uninterrupted):
    process = run(*arguments("train", trained, tmp_path))
    state = tmp_path / "train_resume.th"
    wait_for(state, process)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == 130 and re.fullmatch(r"train: interrupted; continue with --resume .*\n", error)
    refused = run(*arguments("train", trained, tmp_path))
    _, error = refused.communicate()
    assert refused.returncode == 1 and "add --resume to continue it or --overwrite" in error
    assert state.exists(), "nothing is lost"
    other = run(*arguments("train", trained, tmp_path), "--resume", "--seed", 5)
    _, error = other.communicate()
    assert other.returncode == 1 and "--seed is 5 but was 0 before" in error
    process = run(*arguments("train", trained, tmp_path), "--resume")
    out, _ = process.communicate()
    assert process.returncode == 0
    assert [line.split()[0] for line in out.splitlines() if line.split()[0].isdigit()] == ["1", "2", "3"]
    for name in RESULTS["train"]:
        assert (tmp_path / name).read_bytes() == uninterrupted[name], name


def test_resume_notices_a_replaced_checkpoint(folder, tmp_path, capsys):
    command = arguments("optimize", folder, tmp_path / "out")
    process = run(*command, "--nb-iter", 10000)
    wait_for(tmp_path / "out" / "optimize_resume.th", process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    shutil.copy(folder / "model_init.th", folder / "last_model.th")
    (folder / "last_model.json").unlink()
    error = failure(capsys, optimize, [*map(str, command[1:]), "--nb-iter", "10000", "--resume"])
    assert "--checkpoint is" in error and "in the run to resume" in error
    (tmp_path / "out" / "optimize_resume.th").write_bytes((folder / "trigger_info.th").read_bytes())
    error = failure(capsys, optimize, [*map(str, command[1:]), "--nb-iter", "10000", "--resume"])
    assert "not a resume state" in error


def test_resume_of_a_complete_run_changes_nothing(folder, trained, capsys):
    args = ["--output-dir", str(folder), *source(trained), "--precision", "fp32"]
    args += ["--val-frac", "0.1", "--nb-iter", "4", "--print-every", "2", "--batch-size", "32"]
    before = (folder / "mask_values.txt").stat().st_mtime_ns
    assert optimize.main([*args, "--resume"]) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert (folder / "mask_values.txt").stat().st_mtime_ns == before


@pytest.mark.slow
def test_second_process_is_refused(tmp_path, trained):
    process = run(*arguments("train", trained, tmp_path), "--epoch", 1000)
    wait_for(tmp_path / "train_resume.th", process)
    second = run(*arguments("train", trained, tmp_path), "--resume")
    _, error = second.communicate()
    process.kill()
    process.communicate()
    assert second.returncode == 1 and "another process works in this folder" in error and error.count("\n") == 1


def test_full_disk(tmp_path, trained):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = run(*arguments("train", trained, tmp_path), preexec_fn=limit)
    _, error = process.communicate()
    assert process.returncode == 1 and error.count("\n") == 1 and "File too large" in error
    assert not [
        path for path in tmp_path.iterdir() if path.name.endswith((".part", ".th")) and "trigger" not in path.name
    ]


@pytest.mark.slow
def test_from_any_folder_and_no_bar_without_a_terminal(tmp_path, trained):
    command = [sys.executable, str(ROOT / "prune_neuron_cifar.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    text = " ".join(done.stdout.split())
    assert done.returncode == 0 and "(default: ./save)" in text and "--max-acc-drop POINTS" in text
    process = run(*arguments("optimize", trained, "out"), cwd=tmp_path)
    out, error = process.communicate()
    assert process.returncode == 0 and error == "" and "\r" not in out
    assert (tmp_path / "out" / "mask_values.txt").exists() and not (ROOT / "out").exists()
