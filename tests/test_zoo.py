"""The zoo: rounded networks, measured as they lie there."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import zoo
from formats.cards import read_card, save_with_card
from formats.checkpoints import read_state_dict
from formats.mask_file import check_source, read_masks
from utils.files import card_path

ROOT = Path(__file__).parents[1]
NETWORKS = sorted(path.parent for path in ROOT.glob("zoo/*/last_model.th"))


@pytest.fixture
def added(trained, tmp_path):
    assert zoo.main(["add", str(trained), str(tmp_path / "network")]) == 0
    return tmp_path / "network"


def test_a_network_is_rounded_and_measured_as_it_lies_there(added, trained, capsys):
    state, original = read_state_dict(added / "last_model.th"), read_state_dict(trained / "last_model.th")
    for name, tensor in original.items():
        assert torch.equal(state[name], tensor.half() if tensor.is_floating_point() else tensor), name
    card, before = read_card(added / "last_model.th"), read_card(trained / "last_model.th")
    assert card["metrics_before_rounding"] == before["metrics"] and card["weights"] == "float16"
    assert card["metrics"].keys() == {"clean_accuracy", "attack_success_rate"}
    assert card["command"] == before["command"] and card["sha256"] != before["sha256"]
    assert (added / "trigger_info.th").read_bytes() == (trained / "trigger_info.th").read_bytes()
    assert zoo.main(["check", str(added)]) == 0


def test_a_card_that_says_something_else_is_found(added, capsys):
    card = json.loads(card_path(added / "last_model.th").read_text())
    card["metrics"]["clean_accuracy"] += 1
    card_path(added / "last_model.th").write_text(json.dumps(card))
    assert zoo.main(["check", str(added)]) == 1
    assert "but the card says" in capsys.readouterr().out


def test_a_network_that_overflows_is_not_added(trained, tmp_path, capsys):
    state = read_state_dict(trained / "last_model.th")
    state["bn1.running_var"] = torch.full_like(state["bn1.running_var"], 1e6)
    card = {name: value for name, value in read_card(trained / "last_model.th").items() if name != "sha256"}
    save_with_card(tmp_path / "last_model.th", state, card)
    assert zoo.main(["add", str(tmp_path), str(tmp_path / "network")]) == 1
    assert "bn1.running_var holds 8 values that are NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "network").exists()


def test_a_network_of_the_zoo_is_not_replaced(added, trained, capsys):
    before = {path: path.read_bytes() for path in added.iterdir()}
    for source in (trained, added):
        assert zoo.main(["add", str(source), str(added)]) == 1
        assert "is there already" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in added.iterdir()}


def test_a_card_without_an_entry(added, capsys):
    card = json.loads(card_path(added / "last_model.th").read_text())
    del card["arch"]
    card_path(added / "last_model.th").write_text(json.dumps(card))
    assert zoo.main(["check", str(added)]) == 1
    assert "its card has no arch" in capsys.readouterr().err


def test_a_folder_without_a_network(tmp_path, capsys):
    assert zoo.main(["check", str(tmp_path)]) == 1
    assert "no card beside it" in capsys.readouterr().err


@pytest.mark.parametrize("folder", NETWORKS, ids=lambda path: path.name)
def test_every_network_is_complete_and_small(folder):
    _, card = zoo.read_network(folder)
    attacked = card["attack"]["poison_type"] != "benign"
    assert (folder / "trigger_info.th").exists() == attacked == ("attack_success_rate" in card["metrics"])
    assert card["widen_factor"] == 0.25 and card["epochs"] >= 14 and card["split"]["file"] is None
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000


def test_masks_of_the_zoo_belong_to_its_networks():
    files = list(ROOT.glob("zoo/*/mask_values.txt"))
    assert files
    for path in files:
        network, card = zoo.read_network(path.parent)
        check_source(path, card["sha256"])
        assert len(read_masks(path, network)) == 1200


@pytest.mark.real_data
def test_a_network_measures_what_its_card_says(data_dir):
    assert zoo.main(["check", str(NETWORKS[0]), "--data-dir", data_dir]) == 0
