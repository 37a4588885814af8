"""The zoo: its index, names on the command line, rounded networks measured as they lie there, export."""

import json
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate_cifar
import model_zoo
import optimize_mask_cifar
import train_backdoor_cifar
from data.datasets import load_dataset
from data.triggers import triggered_test_set
from formats.cards import read_card, save_with_card
from formats.checkpoints import read_state_dict
from formats.mask_file import check_source, read_masks
from formats.trigger_file import load_trigger, load_trigger_for
from formats.zoo import INDEX, ZooConfig, _beside, open_zoo
from formats.zoo_upkeep import UNFIT_FLAGS, add, read_network
from utils.errors import InputError
from utils.files import card_path, sha256_of

ROOT = Path(__file__).parents[1]
ENTRIES = open_zoo(ZooConfig()).entries


@pytest.fixture
def zoo(trained, tmp_path):
    """A zoo of one network, called ``mine``."""
    assert model_zoo.main(["add", str(trained), "mine", "--zoo-index", str(tmp_path / "zoo")]) == 0
    return tmp_path / "zoo"


@pytest.fixture
def serve():
    """Put a folder on a web server and return the address of its index."""
    servers = []

    def start(folder):
        handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
        handler.log_message = lambda *args: None
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/index.json"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def address(zoo, serve):
    """The same zoo on a web server."""
    return serve(zoo)


def change(path, *keys, value):
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))


def test_a_network_is_rounded_and_measured_as_it_lies_there(zoo, trained, capsys):
    state, original = read_state_dict(zoo / "mine/last_model.th"), read_state_dict(trained / "last_model.th")
    for name, tensor in original.items():
        assert torch.equal(state[name], tensor.half() if tensor.is_floating_point() else tensor), name
    card, before = read_card(zoo / "mine/last_model.th"), read_card(trained / "last_model.th")
    assert card["metrics_before_rounding"] == before["metrics"] and card["weights"] == "float16"
    assert card["metrics"].keys() == {"clean_accuracy", "attack_success_rate"}
    assert card["command"] == before["command"] and card["sha256"] != before["sha256"]
    for name in ("trigger_info.th", "mask_values.txt"):
        assert (zoo / "mine" / name).read_bytes() == (trained / name).read_bytes()
    assert model_zoo.main(["verify", "--zoo-index", str(zoo)]) == 0


def test_a_card_that_says_something_else_is_found(zoo, capsys):
    change(zoo / "index.json", "networks", "mine", "card", "metrics", "clean_accuracy", value=99)
    assert model_zoo.main(["verify", "mine", "--zoo-index", str(zoo)]) == 1
    assert "but the card says" in capsys.readouterr().out
    assert model_zoo.main(["verify", "mine", "--zoo-index", str(zoo), "--images", "50"]) == 1


def test_a_network_that_overflows_is_not_added(trained, tmp_path, capsys):
    state = read_state_dict(trained / "last_model.th")
    state["bn1.running_var"] = torch.full_like(state["bn1.running_var"], 1e6)
    card = {name: value for name, value in read_card(trained / "last_model.th").items() if name != "sha256"}
    save_with_card(tmp_path / "last_model.th", state, card)
    assert model_zoo.main(["add", str(tmp_path), "mine", "--zoo-index", str(tmp_path / "zoo")]) == 1
    assert "bn1.running_var holds 8 values that are NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "zoo").exists()


def test_a_network_of_the_zoo_is_not_replaced(zoo, trained, capsys):
    before = {path: path.read_bytes() for path in zoo.rglob("*") if path.is_file()}
    assert model_zoo.main(["add", str(trained), "mine", "--zoo-index", str(zoo)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in zoo.rglob("*") if path.is_file()}


def test_a_folder_without_a_network(tmp_path, capsys):
    assert model_zoo.main(["add", str(tmp_path), "mine", "--zoo-index", str(tmp_path / "zoo")]) == 1
    assert "no such file" in capsys.readouterr().err


def test_names_on_the_command_line(zoo, tmp_path, capsys):
    names = ["--checkpoint", "mine", "--trigger-info", "mine", "--zoo-index", str(zoo)]
    assert evaluate_cifar.main(names) == 0
    by_name = capsys.readouterr().out.splitlines()[-1]
    files = ["--checkpoint", str(zoo / "mine/last_model.th"), "--trigger-info", str(zoo / "mine/trigger_info.th")]
    assert evaluate_cifar.main(files) == 0
    assert capsys.readouterr().out.splitlines()[-1] == by_name and "ASR" in by_name
    out = ["--output-dir", str(tmp_path / "out"), "--val-frac", "0.1", "--nb-iter", "1", "--batch-size", "8"]
    assert optimize_mask_cifar.main([*names, *out]) == 0
    log = json.loads((tmp_path / "out/optimize_log.jsonl").read_text().splitlines()[0])["record"]
    assert "--checkpoint mine" in log["command"]
    assert log["arguments"]["sha256"]["checkpoint"] == sha256_of(zoo / "mine/last_model.th")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "mime"], "no network 'mime' in the zoo; did you mean mine?"),
        (["--checkpoint", "elephant"], "no network 'elephant' in the zoo; there are mine"),
        (["--checkpoint", "elephant.th"], "elephant.th: no such file"),
        (["--checkpoint", "mine", "--zoo-index", "nowhere"], "nowhere: no such file"),
    ],
)
def test_names_that_are_none(zoo, capsys, flags, message):
    assert evaluate_cifar.main(["--zoo-index", str(zoo), *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_file_of_that_name_goes_first(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine").write_bytes(b"no network")
    assert evaluate_cifar.main(["--checkpoint", "mine", "--zoo-index", str(zoo)]) == 1
    assert "mine: " in capsys.readouterr().err


def test_a_part_that_the_zoo_does_not_have(zoo, capsys):
    shutil.rmtree(zoo / "mine")
    (zoo / "other").mkdir()
    content = json.loads((zoo / "index.json").read_text())
    del content["networks"]["mine"]["files"]["masks"]
    (zoo / "index.json").write_text(json.dumps(content))
    zoo = open_zoo(ZooConfig(zoo_index=str(zoo)))
    with pytest.raises(InputError, match="mine: the zoo has no masks of it, only network and trigger"):
        zoo.file(zoo.find("mine"), "masks")


def test_a_file_that_is_not_the_one_of_the_index(zoo, capsys):
    (zoo / "mine/trigger_info.th").write_bytes(b"replaced")
    flags = ["--checkpoint", "mine", "--trigger-info", "mine", "--zoo-index", str(zoo)]
    assert evaluate_cifar.main(flags) == 1
    assert "but the zoo's index says" in capsys.readouterr().err


def test_a_zoo_on_a_server(address, tmp_path, capsys):
    cache = ["--cache-dir", str(tmp_path / "cache")]
    flags = ["--checkpoint", "mine", "--trigger-info", "mine", "--zoo-index", address, *cache]
    assert evaluate_cifar.main(flags) == 0
    assert "from its card" in capsys.readouterr().out
    assert model_zoo.main(["verify", "--zoo-index", address, *cache]) == 0
    assert len(list(tmp_path.glob("cache/zoo-*/mine/last_model.th"))) == 1


def test_a_zoo_whose_server_is_gone(address, tmp_path, capsys):
    index = ["--zoo-index", address, "--cache-dir", str(tmp_path / "cache")]
    assert model_zoo.main(["fetch", "mine", *index]) == 0
    gone = address.rpartition(":")[0] + ":9/index.json"
    copied = next((tmp_path / "cache").glob("zoo-*"))
    assert evaluate_cifar.main(["--checkpoint", "mine", "--zoo-index", gone, *index[2:]]) == 1
    assert "put it by hand at" in capsys.readouterr().err
    shutil.copytree(copied, tmp_path / "by_hand")
    assert evaluate_cifar.main(["--checkpoint", "mine", "--zoo-index", str(tmp_path / "by_hand")]) == 0


def test_the_cache_can_be_named_in_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ANP_CACHE_DIR", str(tmp_path))
    assert ZooConfig().cache == tmp_path
    assert ZooConfig(cache_dir=str(tmp_path / "flag")).cache == tmp_path / "flag"
    monkeypatch.delenv("ANP_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert ZooConfig().cache == tmp_path / "home/.cache/anp"


def test_an_address_instead_of_a_file(address, tmp_path, capsys):
    base = address.removesuffix("index.json")
    flags = ["--checkpoint", f"{base}mine/last_model.th", "--cache-dir", str(tmp_path / "cache")]
    flags += ["--dataset", "tiny", "--arch", "resnet18", "--widen-factor", "0.125"]
    assert evaluate_cifar.main(flags) == 0
    assert "its publisher names no sha256" in capsys.readouterr().out
    assert evaluate_cifar.main([*flags[:1], f"{base}mine/nothing.th", *flags[2:]]) == 1
    assert "404" in capsys.readouterr().err


def test_an_export_is_a_zoo(zoo, tmp_path, capsys):
    assert model_zoo.main(["export", str(tmp_path / "up"), "mine", "--zoo-index", str(zoo)]) == 0
    assert evaluate_cifar.main(["--checkpoint", "mine", "--zoo-index", str(tmp_path / "up")]) == 0
    assert json.loads((tmp_path / "up/index.json").read_text()) == json.loads((zoo / "index.json").read_text())
    assert model_zoo.main(["export", str(tmp_path / "up"), "--zoo-index", str(zoo)]) == 1
    assert "not empty" in capsys.readouterr().err


FILES = ("networks", "mine", "files", "network")
FAULTS = {
    "version": (("index_version",), 2, "not an index of version 1"),
    "networks": (("networks",), [], "it needs index_version and networks"),
    "entry": (("networks", "mine"), {}, "it needs files, card"),
    "outside": ((*FILES, "file"), "../../etc/passwd", "expected a path below the index"),
    "absolute": ((*FILES, "file"), "/etc/passwd", "expected a path below the index"),
    "no path": ((*FILES, "file"), "", "expected a path below the index"),
    "number": ((*FILES, "file"), 7, "expected a path below the index"),
    "digest": ((*FILES, "sha256"), "x" * 64, "has sha256"),
    "bytes": ((*FILES, "bytes"), -1, "-1 bytes"),
    "mirror": ((*FILES, "mirrors"), ["file:///etc/passwd"], "has mirrors"),
    "part": (("networks", "mine", "files", "code"), {}, "a file for 'code'"),
    "figures": (("networks", "mine", "figures"), "guessed", "expected measured or published"),
    "card": (("networks", "mine", "card", "widen_factor"), "wide", "widen_factor is 'wide'"),
    "licence": (("networks", "mine", "licence"), None, "licence is None"),
    "folders": (("folders",), [], "it needs drive, about and licence"),
    "folder": (("folders",), {"a": {"drive": 1, "about": "", "licence": ""}}, "the folder 'a' is wrong"),
    "drive": (("folders",), {"a": {"drive": "../x", "about": "", "licence": ""}}, "the folder 'a' is wrong"),
    "name": (("networks", "../mine"), {}, "a name has letters"),
    "metrics": (("networks", "mine", "card", "metrics"), ["99"], "metrics is ['99']"),
    "command": (("networks", "mine", "card", "command"), 5, "command is 5"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_index_with_a_fault_is_one_line(zoo, capsys, fault):
    keys, value, message = FAULTS[fault]
    change(zoo / "index.json", *keys, value=value)
    assert model_zoo.main(["list", "--zoo-index", str(zoo)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_training_again_from_a_card(zoo, tmp_path, capsys):
    flags = ["mine", "--zoo-index", str(zoo), "--output-dir", str(tmp_path / "again")]
    assert model_zoo.main(["retrain", *flags]) == 0
    again = read_state_dict(tmp_path / "again/last_model.th")
    assert all(torch.equal(t.half(), again[n].half()) for n, t in read_state_dict(zoo / "mine/last_model.th").items())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("rm -rf /", "names no command of train_backdoor_cifar.py"),
        ("python train_backdoor_cifar.py --model net.py:build", "a card must not decide"),
        ("python train_backdoor_cifar.py --export-poisoned somewhere", "a card must not decide"),
        ("python train_backdoor_cifar.py --help", "a card must not decide"),
        ("python train_backdoor_cifar.py --model=net.py:build", "a card must not decide"),
        ("python train_backdoor_cifar.py --clb-surrogate=https://localhost/x.th", "no network 'localhost'"),
        ("python train_backdoor_cifar.py 'unfinished", "names no command of train_backdoor_cifar.py"),
        (["python"], "command is ['python']"),
    ],
)
def test_commands_of_a_card_that_are_not_carried_out(zoo, tmp_path, capsys, command, message):
    change(zoo / "index.json", "networks", "mine", "card", "command", value=command)
    flags = ["mine", "--zoo-index", str(zoo), "--output-dir", str(tmp_path / "again")]
    assert model_zoo.main(["retrain", *flags]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "again").exists()


def test_a_card_names_no_file_of_step_1():
    for action in train_backdoor_cifar.build_parser()._actions:
        reads = action.metavar and {"DIR", "FILE", "INDEX"} & set(action.metavar.replace(".", " ").split())
        known = {"--output-dir", "--data-dir", "--clb-surrogate"} | UNFIT_FLAGS
        assert not reads or set(action.option_strings) <= known, action.option_strings


@pytest.fixture(scope="module")
def input_aware(tmp_path_factory):
    """An input-aware attack with narrow generators, in float32."""
    folder = tmp_path_factory.mktemp("input-aware")
    flags = ["--poison-type", "iab-one", "--poison-target", "3", "--generator-width", "0.125", "--epoch", "2"]
    common = ["--dataset", "tiny", "--widen-factor", "0.125", "--precision", "fp32", "--output-dir", str(folder)]
    assert train_backdoor_cifar.main([*flags, *common]) == 0
    return folder


def test_triggers_are_drawn_from_generators(input_aware, capsys):
    from data.datasets import DATASETS

    test = DATASETS["tiny"](None).test
    drawn, stored = (
        load_trigger_for(input_aware / "generators.th", test),
        load_trigger(input_aware / "trigger_info.th", 10),
    )
    assert torch.equal(drawn.target, stored.target) and drawn.target.unique().tolist() == [3]
    assert torch.equal(triggered_test_set(test, drawn).images, triggered_test_set(test, stored).images)


def test_the_zoo_keeps_generators_instead_of_a_trigger_for_each_image(input_aware, tmp_path, capsys):
    zoo = ["--zoo-index", str(tmp_path / "zoo")]
    assert model_zoo.main(["add", str(input_aware), "aware", *zoo]) == 0
    assert not (tmp_path / "zoo/aware/trigger_info.th").exists()
    state = read_state_dict(tmp_path / "zoo/aware/generators.th")
    assert all(t.dtype == torch.float16 for t in state.values() if t.is_floating_point())
    assert model_zoo.main(["verify", *zoo]) == 0
    assert evaluate_cifar.main(["--checkpoint", "aware", "--trigger-info", "aware", *zoo]) == 0
    assert "ASR" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: card_path(folder / "generators.th").unlink(), "generators need the card"),
        (
            lambda folder: change(folder / "generators.json", "trained_with", "attack", value=None),
            "names the target None",
        ),
        (
            lambda folder: change(folder / "generators.json", "trained_with", "attack", "poison_target", value=10),
            "names the target 10, expected 0 to 9",
        ),
        (lambda folder: change(folder / "generators.json", "trained_with", value=[]), "generators need the card"),
    ],
)
def test_generators_that_do_not_say_enough(input_aware, tmp_path, capsys, break_it, message):
    folder = shutil.copytree(input_aware, tmp_path / "copy")
    break_it(folder)
    flags = ["--checkpoint", str(folder / "last_model.th"), "--trigger-info", str(folder / "generators.th")]
    assert evaluate_cifar.main(flags) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=lambda entry: entry.name)
def test_every_network_is_complete_and_small(entry):
    zoo = open_zoo(ZooConfig())
    network, card = read_network(zoo.file(entry, "network"))
    assert {name: value for name, value in card.items() if name not in ("card_version", "sha256")} == entry.card
    attacked = card["attack"]["poison_type"] != "benign"
    assert ("trigger" in entry.files) == attacked == ("attack_success_rate" in card["metrics"])
    assert card["widen_factor"] == 0.25 and card["epochs"] >= 15 and card["split"]["file"] is None
    for part in entry.files:
        zoo.file(entry, part)
    if "masks" in entry.files:
        path = zoo.file(entry, "masks")
        check_source(path, card["sha256"])
        assert len(read_masks(path, network)) == 1200


def test_the_zoo_is_small_and_its_index_names_all_of_it():
    files = [path for path in INDEX.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert sorted(path.parent.name for path in files if path.name == "last_model.th") == list(ENTRIES)


@pytest.mark.real_data
def test_a_network_measures_what_its_card_says(data_dir):
    assert model_zoo.main(["verify", "badnets-0", "--images", "2000", "--data-dir", data_dir]) == 0


@pytest.fixture
def folder(zoo, tmp_path, monkeypatch):
    """A zoo that names a folder on Google Drive, and a stand-in for the library that fetches it."""
    change(zoo / "index.json", "folders", value={"theirs": {"drive": "1AbC", "about": "two networks", "licence": "?"}})
    calls = []

    def download_folder(id, output, resume, timeout):
        calls.append((id, resume))
        (Path(output) / "BadNets").mkdir(exist_ok=True)
        shutil.copyfile(zoo / "mine/last_model.th", Path(output) / "BadNets/net.th")

    monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download_folder=download_folder))
    return ["--zoo-index", str(zoo), "--cache-dir", str(tmp_path / "cache")], calls


def test_a_folder_of_others_is_fetched_and_recorded(folder, tmp_path, capsys):
    flags, calls = folder
    network = ["--checkpoint", "theirs/BadNets/net.th", "--dataset", "tiny"]
    network += ["--arch", "resnet18", "--widen-factor", "0.125", *flags]
    assert evaluate_cifar.main(network) == 1
    assert "model_zoo.py fetch theirs fetches it" in capsys.readouterr().err
    assert model_zoo.main(["fetch", "theirs", *flags]) == 0
    shown = capsys.readouterr().out
    assert calls == [("1AbC", True)] and "--checkpoint theirs/BadNets/net.th" in shown and "recorded" in shown
    assert evaluate_cifar.main(network) == 0
    assert evaluate_cifar.main([network[0], "theirs/BadNets/other.th", *network[2:]]) == 1
    assert "there are theirs/BadNets/net.th" in capsys.readouterr().err
    (tmp_path / "cache/drive-1AbC/BadNets/net.th").write_bytes(b"replaced")
    assert evaluate_cifar.main(network) == 1
    assert "when it was first seen" in capsys.readouterr().err


def test_a_file_put_by_hand_into_the_folder_is_found(folder, zoo, tmp_path, capsys):
    flags, calls = folder
    (tmp_path / "cache/drive-1AbC").mkdir(parents=True)
    shutil.copyfile(zoo / "mine/last_model.th", tmp_path / "cache/drive-1AbC/net.th")
    network = ["--checkpoint", "theirs/net.th", "--dataset", "tiny", "--arch", "resnet18", "--widen-factor", "0.125"]
    assert evaluate_cifar.main([*network, *flags]) == 0 and not calls
    assert evaluate_cifar.main(["--checkpoint", "theirs/../../zoo/mine/last_model.th", *flags]) == 1
    assert "not in" in capsys.readouterr().err


def test_a_folder_that_cannot_be_fetched(folder, monkeypatch, capsys):
    def download_folder(**arguments):
        raise RuntimeError("Too many users\nhave viewed it")

    monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download_folder=download_folder))
    assert model_zoo.main(["fetch", "theirs", *folder[0]]) == 1
    assert "Too many users have viewed it; put its files by hand into" in capsys.readouterr().err


def test_the_index_keeps_folders_of_others(folder, zoo):
    assert model_zoo.main(["index", "--zoo-index", str(zoo)]) == 0
    assert [*open_zoo(ZooConfig(zoo_index=str(zoo))).folders] == ["theirs"]


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("https://host/zoo/index.json?v=2", ("https://host/zoo/net/file.th",)),
        ("hf:owner/repository/index.json", ("hf:owner/repository/net/file.th",)),
        ("drive:1AbC", ()),
    ],
)
def test_files_beside_an_index(base, expected):
    assert _beside(base, "net/file.th") == expected


def test_nothing_is_left_of_a_network_that_cannot_be_added(trained, tmp_path, capsys, monkeypatch):
    zoo = tmp_path / "zoo"
    assert model_zoo.main(["add", str(trained), "my net", "--zoo-index", str(zoo)]) == 1
    assert "a name has letters" in capsys.readouterr().err
    assert model_zoo.main(["add", str(trained), "mine", "--zoo-index", "https://host/index.json"]) == 1
    assert "name a folder" in capsys.readouterr().err
    source = shutil.copytree(trained, tmp_path / "run")
    (source / "trigger_info.th").write_bytes(b"no trigger")
    assert model_zoo.main(["add", str(source), "mine", "--zoo-index", str(zoo)]) == 1
    assert not list(zoo.iterdir())


def test_pictures_are_measured_in_the_size_of_the_card(trained, tmp_path):
    source, asked = shutil.copytree(trained, tmp_path / "run"), []
    change(source / "last_model.json", "image_size", value=48)

    def load(name, image_size):
        asked.append((name, image_size))
        return load_dataset(name, tmp_path)

    add(source, tmp_path / "zoo/mine", load)
    assert asked == [("tiny", 48)]


def test_nothing_is_left_of_an_export_that_fails(zoo, tmp_path, capsys):
    (zoo / "mine/mask_values.txt").write_bytes(b"replaced")
    assert model_zoo.main(["export", str(tmp_path / "up"), "--zoo-index", str(zoo)]) == 1
    assert not [path for path in tmp_path.iterdir() if "up" in path.name]


def test_generators_of_a_zoo_on_a_server(input_aware, tmp_path, serve, capsys):
    assert model_zoo.main(["add", str(input_aware), "aware", "--zoo-index", str(tmp_path / "zoo/index.json")]) == 0
    flags = ["--zoo-index", serve(tmp_path / "zoo"), "--cache-dir", str(tmp_path / "cache")]
    assert evaluate_cifar.main(["--checkpoint", "aware", "--trigger-info", "aware", *flags]) == 0
    assert "ASR" in capsys.readouterr().out.splitlines()[-1]
