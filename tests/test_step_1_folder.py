"""What step 1 writes about its images, and what it must not lose."""

import csv
import json
import shutil

import pytest
import torch

import optimize_mask_cifar as optimize
import train_backdoor_cifar as train
from formats.cards import save_with_card
from models import build_model

COMMON = ["--dataset", "tiny", "--widen-factor", "0.0625", "--epoch", "1", "--threads", "1", "--precision", "fp32"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A poisoned set as pictures, and its table in another order."""
    folder = tmp_path_factory.mktemp("exported")
    export = ["--export-poisoned", str(folder / "set"), "--output-dir", str(folder / "first")]
    assert train.main([*COMMON, *export]) == 0
    table = folder / "set" / "poisoned.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *sorted(rows)]) + "\n")
    return folder


def test_the_poisoned_indices_of_a_folder_are_the_datasets(exported, tmp_path):
    folder = ["--poison-type", "folder", "--poisoned-dir", str(exported / "set")]
    assert train.main([*COMMON, *folder, "--output-dir", str(tmp_path)]) == 0
    with (exported / "set" / "poisoned.csv").open(newline="") as file:
        expected = {int(row["index"]) for row in csv.DictReader(file) if row["poisoned"] == "1"}
    written = {name: torch.load(place / "trigger_info.th")["data_index"].tolist() for name, place in
               (("again", tmp_path), ("first", exported / "first"))}  # fmt: skip
    assert set(written["again"]) == set(written["first"]) == expected and len(expected) > 10


def test_a_trigger_that_does_not_fit_costs_nothing(exported, tmp_path, capsys):
    shutil.copytree(exported / "set", tmp_path / "set")
    content = torch.load(tmp_path / "set" / "trigger_info.th")
    for name in ("trigger_pattern", "trigger_mask"):
        content[name] = content[name][:, 16:, 16:]
    torch.save(content, tmp_path / "set" / "trigger_info.th")
    out = tmp_path / "out"
    assert train.main([*COMMON, "--poison-type", "benign", "--output-dir", str(out)]) == 0
    before = (out / "last_model.th").read_bytes()
    folder = ["--poison-type", "folder", "--poisoned-dir", str(tmp_path / "set"), "--overwrite"]
    assert train.main([*COMMON, *folder, "--output-dir", str(out)]) == 1
    assert "the trigger is 16x16" in capsys.readouterr().err
    assert (out / "last_model.th").read_bytes() == before


def test_a_surrogate_behind_a_link_is_not_overwritten(exported, tmp_path, capsys):
    shutil.copytree(exported / "first", tmp_path / "first")
    (tmp_path / "link").symlink_to(tmp_path / "first")
    flags = ["--poison-type", "clean-label", "--clb-surrogate", str(tmp_path / "link" / "last_model.th"), "--overwrite"]
    assert train.main([*COMMON, *flags, "--output-dir", str(tmp_path / "first")]) == 1
    assert "would be overwritten" in capsys.readouterr().err


def test_networks_kept_on_the_way_are_not_lost(exported, tmp_path, capsys):
    (tmp_path / "model_20.th").write_text("of an older run")
    assert train.main([*COMMON, "--output-dir", str(tmp_path)]) == 1
    assert "model_20.th is there already" in capsys.readouterr().err


def test_a_repaired_card_claims_no_split_that_nobody_knows(tmp_path, capsys):
    torch.save(build_model("resnet18", 10, 0.0625).state_dict(), tmp_path / "theirs.th")
    flags = ["--widen-factor", "0.0625", "--dataset", "tiny", "--val-frac", "0.1", "--nb-iter", "1"]
    source = ["--checkpoint", str(tmp_path / "theirs.th"), "--output-dir", str(tmp_path)]
    assert optimize.main([*source, *flags]) == 0
    import prune_neuron_cifar as prune

    masks = ["--mask-file", str(tmp_path / "mask_values.txt"), "--pruning-max", "0.1"]
    assert prune.main([*source, *flags[:-2], *masks]) == 0
    card = json.loads((tmp_path / "repaired_model.json").read_text())
    assert card["split"] == {} and card["attack"] is None
    flags = ["--poison-type", "clean-label", "--clb-surrogate", str(tmp_path / "repaired_model.th"), "--clb-steps", "1"]
    assert train.main([*COMMON, *flags, "--output-dir", str(tmp_path / "out")]) == 0, "a card without attack is read"


def test_a_card_that_names_an_unknown_network(tmp_path, capsys):
    save_with_card(tmp_path / "m.th", build_model("resnet18", 10, 0.0625).state_dict(), {"arch": "densenet"})
    assert optimize.main(["--checkpoint", str(tmp_path / "m.th"), "--output-dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "m.json: arch = 'densenet': choose from resnet18" in error and error.count("\n") == 1


def export(place, out, *flags):
    return train.main([*COMMON, *flags, "--export-poisoned", str(place), "--output-dir", str(out)])


def test_a_set_that_is_there_is_known_by_its_pixels_and_its_trigger(tmp_path, capsys):
    """The table says which images were poisoned, not how."""
    place = tmp_path / "set"
    assert export(place, tmp_path / "first") == 0
    before = {path: path.read_bytes() for path in place.rglob("*.*")}
    assert export(place, tmp_path / "again") == 0, "the same set may be there"
    for number, flags in enumerate((["--poison-type", "blend"], ["--trigger-alpha", "0.3"])):
        capsys.readouterr()
        assert export(place, tmp_path / str(number), *flags) == 1
        assert "another set is there" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in place.rglob("*.*")}
    next(place.glob("*/*.png")).unlink()
    assert export(place, tmp_path / "incomplete") == 1
    assert "another set is there" in capsys.readouterr().err
