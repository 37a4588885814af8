"""The script of the other defences: files, flags, resume, chains, errors."""

import json
import re
import shutil

import pytest
import torch

import defend_cifar
import evaluate_cifar
import optimize_mask_cifar
import prune_neuron_cifar
from defenses import DEFENSES
from defenses.tuning import TuningConfig
from tests.small import interrupt_after
from utils.config import flag_fields
from utils.identity import difference

SHORT = ["--nb-iter", "4", "--batch-size", "32", "--print-every", "2"]
LENGTH = {
    "mcr": [*SHORT, "--mcr-end-iter", "3"],
    "nad": [*SHORT, "--nad-teacher-iter", "3"],
    "clp": ["--clp-u", "1"],
}
ALWAYS = {"repaired_model.th", "repaired_model.json", "defend_log.jsonl", ".lock"}


def command(name, folder, into, *flags, checkpoint="last_model.th"):
    source = ["--checkpoint", f"{folder}/{checkpoint}", "--trigger-info", f"{folder}/trigger_info.th"]
    given = ["--defense", name, *source, "--output-dir", str(into), "--precision", "fp32", "--val-frac", "0.1"]
    return [*given, *LENGTH.get(name, SHORT), *map(str, flags)]


def rows(folder):
    return [json.loads(line) for line in (folder / "defend_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", DEFENSES)
def test_every_defence_saves_a_network_and_what_was_done(name, trained, tmp_path, capsys):
    assert defend_cifar.main(command(name, trained, tmp_path)) == 0
    printed = capsys.readouterr().out
    curve = {"curve.jsonl", "curve.png", "curve.pdf"} if name == "mcr" else set()
    assert {path.name for path in tmp_path.iterdir()} == ALWAYS | curve
    card = json.loads((tmp_path / "repaired_model.json").read_text())
    record, *log = rows(tmp_path)
    assert record["record"]["ended"] and f"{log[-1]['C-Acc %']:.2f}" in printed.splitlines()[-2]
    assert card["repair"]["method"] == DEFENSES[name].title and card["repair"]["seconds"] > 0
    assert card["repair"]["settings"].keys() >= ({"lr", "iterations", "seed"} if name != "clp" else {"u"})
    assert card["metrics"]["clean_accuracy"] == round(log[-1]["C-Acc %"], 2)
    assert card["metrics"].keys() == {"clean_accuracy", "attack_success_rate", "defender_accuracy"}
    before = torch.load(trained / "last_model.th")
    after = torch.load(tmp_path / "repaired_model.th")
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    flags = ["--checkpoint", f"{tmp_path}/repaired_model.th", "--trigger-info", f"{trained}/trigger_info.th"]
    assert evaluate_cifar.main([*flags, "--precision", "fp32"]) == 0
    assert f"C-Acc {card['metrics']['clean_accuracy']:.2f} %" in capsys.readouterr().out.splitlines()[-1]


def test_the_curve_is_written_and_its_result_is_the_place_chosen(trained, tmp_path):
    assert defend_cifar.main(command("mcr", trained, tmp_path, "--mcr-t", "0.6")) == 0
    _, *curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    card = json.loads((tmp_path / "repaired_model.json").read_text())
    assert [row["t"] for row in curve] == [number / 10 for number in range(11)]
    assert card["repair"]["chosen"] == "t = 0.6"
    chosen = {name: round(curve[6][name], 2) for name in ("C-Acc %", "ASR %")}
    assert chosen == {"C-Acc %": card["metrics"]["clean_accuracy"], "ASR %": card["metrics"]["attack_success_rate"]}


@pytest.mark.parametrize("name", ["ft", "fp", "mcr", "nad"])
def test_interrupted_a_run_ends_bit_identical(name, trained, tmp_path, monkeypatch, capsys):
    assert defend_cifar.main(command(name, trained, tmp_path / "whole")) == 0
    for steps, resume in ((2, []), (1, ["--resume"])):
        with monkeypatch.context() as patch:
            interrupt_after(patch, steps)
            assert defend_cifar.main(command(name, trained, tmp_path / "parts", *resume)) == 130
        assert re.fullmatch(r"defend: interrupted; continue with --resume .*\n", capsys.readouterr().err)
    assert defend_cifar.main(command(name, trained, tmp_path / "parts", "--resume")) == 0
    files = ["repaired_model.th", *(["curve.png"] if name == "mcr" else [])]
    for each in files:
        assert (tmp_path / "parts" / each).read_bytes() == (tmp_path / "whole" / each).read_bytes(), each
    one, other = ([{**row, "seconds": 0} for row in rows(tmp_path / part)[1:]] for part in ("parts", "whole"))
    assert one == other
    capsys.readouterr()
    assert defend_cifar.main(command(name, trained, tmp_path / "parts", "--resume")) == 0
    assert "complete; nothing to resume" in capsys.readouterr().out
    assert defend_cifar.main(command(name, trained, tmp_path / "parts", "--resume", "--lr", "0.5")) == 1
    assert "--lr is 0.5 but was" in capsys.readouterr().err


def test_a_defence_follows_another(trained, tmp_path):
    """ANP, then FT: pruned neurons stay pruned, and the card tells the whole story."""
    folder = shutil.copytree(trained, tmp_path / "save")
    flags = ["--checkpoint", f"{folder}/last_model.th", "--output-dir", str(folder), "--precision", "fp32"]
    pruning = [*flags, "--val-frac", "0.1", "--mask-file", f"{folder}/mask_values.txt", "--number", "5"]
    assert prune_neuron_cifar.main(pruning) == 0
    anp = json.loads((folder / "repaired_model.json").read_text())
    assert defend_cifar.main(command("ft", folder, tmp_path / "ft", checkpoint="repaired_model.th")) == 0
    card = json.loads((tmp_path / "ft" / "repaired_model.json").read_text())
    assert card["repair"]["method"] == "FT" and card["repair"]["after"] == anp["repair"]
    before, after = (torch.load(path / "repaired_model.th") for path in (folder, tmp_path / "ft"))
    zeros = {name: (before[name] == 0) for name in before if name.endswith("weight") and before[name].dim() == 1}
    assert sum(int(zero.sum()) for zero in zeros.values()) == 5
    assert all((after[name][zero] == 0).all() for name, zero in zeros.items())
    assert not any((after[name][~zero] == 0).any() for name, zero in zeros.items())


def test_step_2_takes_a_repaired_network(trained, tmp_path):
    assert defend_cifar.main(command("clp", trained, tmp_path)) == 0
    flags = ["--checkpoint", f"{tmp_path}/repaired_model.th", "--output-dir", str(tmp_path / "masks")]
    assert optimize_mask_cifar.main([*flags, "--val-frac", "0.1", "--nb-iter", "1", "--batch-size", "8"]) == 0


def test_results_are_not_overwritten_unless_asked(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "save")
    (folder / "repaired_model.th").write_bytes(b"of step 3")
    assert defend_cifar.main(command("clp", folder, folder)) == 1
    assert "is there already; choose another --output-dir or --overwrite" in capsys.readouterr().err
    assert (folder / "repaired_model.th").read_bytes() == b"of step 3"
    assert defend_cifar.main(command("clp", folder, folder, "--overwrite")) == 0
    assert (folder / "mask_values.txt").exists() and (folder / "last_model.th").exists()


def test_a_smaller_network_on_request(trained, tmp_path):
    assert defend_cifar.main(command("clp", trained, tmp_path, "--compact")) == 0
    card = json.loads((tmp_path / "compact_model.json").read_text())
    assert card["compact"] and (tmp_path / "compact_model.th").exists()


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("clp", ["--nb-iter", "3"], "--nb-iter has no effect with --defense clp; leave it out"),
        ("ft", ["--sam-rho", "3"], "--sam-rho has no effect with --defense ft; leave it out"),
        ("ft", ["--lr", "0"], "--lr: 0 is out of range: it must be above 0"),
        ("nad", ["--nad-beta", "1", "2"], "--nad-beta: 2 values, expected one for each of 3 stages"),
        ("mcr", ["--mcr-t", "1.5"], "--mcr-t: 1.5 is out of range: it must be 0 to 1"),
        ("anp", [], "argument --defense: invalid choice: 'anp'"),
    ],
)
def test_flags_that_mean_nothing(name, flags, message, trained, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        defend_cifar.main([*command(name, trained, tmp_path / "x"), *flags])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_learning_rate_that_ruins_the_network(trained, tmp_path, capsys):
    assert defend_cifar.main(command("ft", trained, tmp_path, "--lr", "1e30")) == 1
    error = capsys.readouterr().err
    assert "the network's loss on clean images is" in error and "it diverged; lower --lr" in error
    assert error.count("\n") == 1 and not (tmp_path / "repaired_model.th").exists()


@pytest.mark.parametrize("name", ["ft", "fp", "clp"])
def test_a_repair_that_leaves_a_guessing_network_is_said(name, trained, tmp_path, monkeypatch, capsys):
    """The tiny network guesses before, too, so what is ruined is decided here."""
    remedies = {"ft": "lower --lr", "fp": "lower --fp-tolerance or --lr", "clp": "raise --clp-u"}
    monkeypatch.setattr(defend_cifar, "is_ruined", lambda before, after, images: True)
    assert defend_cifar.main(command(name, trained, tmp_path)) == 0
    assert f"warning: the repaired network only guesses; {remedies[name]}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", DEFENSES)
def test_a_remedy_is_a_flag_that_the_defence_takes(name):
    named = re.findall("--([a-z-]+)", DEFENSES[name].milder)
    assert named and {flag.replace("-", "_") for flag in named} <= flag_fields(DEFENSES[name]).keys()


def test_every_flag_says_which_defence_takes_it(capsys):
    with pytest.raises(SystemExit):
        defend_cifar.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: {each.title}" in text for name, each in DEFENSES.items())
    assert "2000 for ft, fp, mcr, nad; 400 for ft-sam; 100 for ban" in text
    assert {name for name, each in DEFENSES.items() if issubclass(each, TuningConfig)} == set(DEFENSES) - {"clp"}


def test_another_defence_in_the_folder_is_named_before_its_flags():
    before = {"sha256": {}, "defense": "clp", "clp_u": 3.0}
    now = {"sha256": {}, "defense": "ban", "ban_eps": 0.3}
    assert difference(before, now) == "--defense is ban but was clp before"
