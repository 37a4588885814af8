"""Checkpoints as other toolkits write them."""

import argparse
import json
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch

import evaluate_cifar
import optimize_mask_cifar
import prune_neuron_cifar
from data.datasets import DATASETS
from formats.layouts import READERS, read_checkpoint, read_content
from formats.outputs import OUTPUTS
from models import ARCHITECTURES, build_model
from models.recognise import recognise
from utils.errors import InputError
from utils.files import load_torch, save_torch

NARROW = 1 / 16


def filled(arch="preactresnet18", classes=10, width=NARROW):
    torch.manual_seed(0)
    network = build_model(arch, classes, width)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.2)
    return network.state_dict()


def backdoorbench(version=2, model=None):
    index = np.arange(3)
    kept = {i: {"path": f"record/bd_test_dataset/1/{i}.png", "other_info": [0, 1]} for i in index}
    state = {"bd_data_container": {"data_dict": kept}, "original_index_array": index}
    pixels = {"x": torch.rand(3, 3, 32, 32), "y": torch.zeros(3).long(), "original_index": index}
    return {
        "model_name": "preactresnet18",
        "num_classes": 10,
        "model": model or filled(),
        "data_path": "../data",
        "img_size": (32, 32, 3),
        "clean_data": "cifar10",
        "bd_train": pixels if version == 1 else None,
        "bd_test": pixels if version == 1 else state,
    }


def input_aware():
    optimizer = {"state": {0: {"momentum_buffer": torch.rand(2)}}, "param_groups": [{"lr": 0.01}]}
    nets = {"netC": filled(), "netG": {"w": torch.ones(1)}, "netM": {"w": torch.ones(1)}}
    return {**nets, "optimizerC": optimizer, "epoch": 3, "opt": argparse.Namespace(dataset="cifar10", lr_C=0.01)}


def rnp():
    state = {f"module.{name}": tensor for name, tensor in filled("resnet18").items()}
    return {"epoch": 9, "state_dict": state, "clean_acc": 90.0, "bad_acc": 99.0, "optimizer": {"state": {}}}


def trojanzoo(arch="resnet18"):
    renamed = OrderedDict()
    for name, tensor in filled(arch).items():
        name = name.replace("shortcut", "downsample")
        renamed[name.replace("linear", "classifier.fc") if "linear" in name else f"features.{name}"] = tensor
    return renamed


LAYOUTS = {
    "bare": (lambda: filled("resnet18"), "resnet18"),
    "wrapped": (lambda: {f"module.{name}": tensor for name, tensor in filled("resnet18").items()}, "resnet18"),
    "backdoorbench": (backdoorbench, "preactresnet18"),
    "input-aware": (input_aware, "preactresnet18"),
    "rnp": (rnp, "resnet18"),
    "trojanzoo": (trojanzoo, "resnet18"),
}


def same(one, other):
    """Compare contents in which tensors and arrays may lie anywhere, with their types."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, argparse.Namespace):
        return same(vars(one), vars(other))
    if isinstance(one, dict):
        return list(one) == list(other) and type(one) is type(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and type(one) is type(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_and_recognised(tmp_path, layout):
    make, arch = LAYOUTS[layout]
    save_torch(tmp_path / "theirs.pt", make())
    found = read_checkpoint(tmp_path / "theirs.pt")
    assert found.layout == layout and same(dict(found.state_dict), dict(filled(arch)))
    assert recognise(found.state_dict) == (arch, NARROW, 10)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_weights_go_where_the_old_ones_were(tmp_path, layout, half):
    content = LAYOUTS[layout][0]()
    old = read_content(content, "x").state_dict
    if half:
        content = read_content(content, "x").with_weights(old)
        place = read_content(content, "x").place
        weights = content[place[0]] if place else content
        weights.update({name: t.half() if t.is_floating_point() else t for name, t in weights.items()})
    save_torch(tmp_path / "theirs.pt", content)
    new = {name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in old.items()}
    theirs = read_checkpoint(tmp_path / "theirs.pt")
    save_torch(tmp_path / "new.pt", theirs.with_weights(new))
    again = read_checkpoint(tmp_path / "new.pt")
    dtype = torch.float16 if half else torch.float32
    assert same(dict(again.state_dict), {n: t.to(dtype) if t.is_floating_point() else t for n, t in new.items()})
    assert same(again.with_weights(old), content)
    assert same(theirs.content, content)  # what was read is not changed


def test_the_first_version_of_backdoorbench_holds_pictures_as_arrays(tmp_path):
    save_torch(tmp_path / "attack_result.pt", backdoorbench(1))
    assert read_checkpoint(tmp_path / "attack_result.pt").layout == "backdoorbench"


def test_pictures_inside_are_refused_with_what_to_do_instead(tmp_path):
    from PIL import Image

    torch.save({**backdoorbench(), "bd_test": [Image.new("RGB", (4, 4))]}, tmp_path / "attack_result.pt")
    with pytest.raises(InputError, match=r"it asks to run PIL.Image.Image; .*weights alone.*--triggered-images"):
        read_checkpoint(tmp_path / "attack_result.pt")


class Tricky:
    """Pickles as a Namespace with any state."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return argparse.Namespace, (), self.state


@pytest.mark.parametrize(
    "state",
    [
        {"__setstate__": OrderedDict},
        {"__class__": OrderedDict},
        (None, {"__class__": OrderedDict}),
        {"__dict__": {}},
        {3: 4},
        [1],
    ],
)
def test_options_with_names_that_python_calls_are_refused(tmp_path, state):
    torch.save({"netC": filled(), "opt": Tricky(state)}, tmp_path / "theirs.pt")
    with pytest.raises(InputError, match=r"argparse\.Namespace"):
        load_torch(tmp_path / "theirs.pt")


def test_options_hold_no_code(tmp_path):
    torch.save({"opt": argparse.Namespace(run=print)}, tmp_path / "theirs.pt")
    with pytest.raises(InputError, match="it asks to run print"):
        load_torch(tmp_path / "theirs.pt")
    torch.save({"opt": argparse.Namespace(a=1, nested=argparse.Namespace(b=[2]))}, tmp_path / "theirs.pt")
    save_torch(tmp_path / "again.pt", load_torch(tmp_path / "theirs.pt"))
    again = torch.load(tmp_path / "again.pt", weights_only=False)["opt"]
    assert type(again) is argparse.Namespace and type(again.nested) is argparse.Namespace and again.nested.b == [2]


@pytest.mark.parametrize("content", [{}, {"weights": {}}, {"model_name": "x", "num_classes": 10, "model": "y"}, 3])
def test_an_unknown_layout_is_one_line_with_the_known_ones(content):
    with pytest.raises(InputError, match=r"holds no state_dict; known layouts: .*trojanzoo.*BackdoorBench") as e:
        read_content(content, "x.pt")
    assert "\n" not in str(e.value)


def test_a_mixed_prefix_stays():
    state = filled("resnet18")
    mixed = {f"module.{n}" if n.startswith("layer") else n: tensor for n, tensor in state.items()}
    found = read_content(mixed, "x")
    assert set(found.state_dict) == set(mixed) and recognise(found.state_dict) is None


# ---- recognising


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("width", [1.0, 0.25, 0.3, 1 / 32])
def test_every_network_is_recognised(arch, width):
    with torch.device("meta"):
        state = build_model(arch, 43, width).state_dict()
    found = recognise(state)
    assert found.arch == arch and found.num_classes == 43
    with torch.device("meta"):
        again = build_model(arch, 43, found.widen_factor).state_dict()
    assert {name: tensor.shape for name, tensor in again.items()} == {name: t.shape for name, t in state.items()}
    assert found.widen_factor == width


def test_what_is_none_of_the_networks_is_not_recognised():
    state = filled("resnet18")
    others = [
        {},
        {"linear.weight": torch.ones(3)},
        {**state, "extra": torch.ones(1)},
        {**state, "conv1.weight": torch.ones(4, 3, 7, 7)},
        {**state, "linear.weight": torch.empty(1, device="meta").expand(10, 2**40)},
        {**state, "linear.weight": torch.nested.nested_tensor([torch.ones(2)])},
        {**state, "bn1.weight": torch.nested.nested_tensor([torch.ones(2)])},
        {name: tensor for name, tensor in state.items() if not name.startswith("layer3.1")},
    ]
    assert [recognise(each) for each in others] == [None] * len(others)


# ---- through the scripts


@pytest.fixture
def theirs(tmp_path):
    def make(layout, content=None):
        save_torch(tmp_path / "theirs.pt", content or LAYOUTS[layout][0]())
        return ["--checkpoint", str(tmp_path / "theirs.pt"), "--dataset", "tiny", "--precision", "fp32"]

    return make


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_foreign_checkpoint_needs_no_flags_of_the_network(theirs, layout, capsys):
    assert evaluate_cifar.main(theirs(layout)) == 0
    out = capsys.readouterr().out
    arch = LAYOUTS[layout][1]
    shown = "" if layout == "bare" else f"layout {layout}, "
    assert f"{shown}{arch}, width 0.0625 (recognised); mean (0.5, 0.5, 0.5) (the dataset's)" in out
    assert "C-Acc" in out


def test_the_usual_normalisation_of_a_toolkit(theirs, capsys, monkeypatch):
    """Known of CIFAR-10 alone, which the tiny set poses as here; a flag is stronger."""
    monkeypatch.setitem(DATASETS, "cifar10", DATASETS["tiny"])
    monkeypatch.setattr("formats.layouts.NORMALIZATIONS", {k: {"tiny": v["cifar10"]} for k, v in usual().items()})
    for layout, std in [
        ("backdoorbench", "0.247"),
        ("input-aware", "0.247"),
        ("rnp", "0.2023"),
        ("trojanzoo", "0.247"),
    ]:
        assert evaluate_cifar.main(theirs(layout)) == 0
        out = capsys.readouterr().out
        assert re.search(rf"mean \(0.491.*\({layout}'s\), std \({std}.*\({layout}'s\)", out)
        assert "many toolkits" not in out
    assert evaluate_cifar.main([*theirs("rnp"), "--std", "1", "1", "1"]) == 0
    assert "std (1.0, 1.0, 1.0) (from --std)" in capsys.readouterr().out


def usual():
    from formats.layouts import NORMALIZATIONS

    return NORMALIZATIONS


def test_weights_that_say_nothing_of_their_input_are_announced(theirs, capsys):
    assert evaluate_cifar.main(theirs("bare")) == 0
    assert "many toolkits use --std 0.247 0.243 0.261, BackdoorBox raw pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arch", "vgg19_bn"], "holds preactresnet18, width 0.0625, 10 classes, not vgg19_bn"),
        (["--widen-factor", "0.5"], "holds preactresnet18, width 0.0625, 10 classes, not preactresnet18, width 0.5"),
    ],
)
def test_flags_that_contradict_the_file(theirs, capsys, flags, message):
    assert evaluate_cifar.main([*theirs("backdoorbench"), *flags]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_another_number_of_classes(theirs, capsys):
    assert evaluate_cifar.main(theirs("", backdoorbench(model=filled(classes=43)))) == 1
    error = capsys.readouterr().err
    assert "43 classes, but tiny has 10; see --dataset" in error and error.count("\n") == 1


def test_wrong_shapes(theirs, capsys):
    broken = {**filled(), "layer1.0.bn1.weight": torch.ones(5)}
    given = theirs("", backdoorbench(model=broken))
    assert evaluate_cifar.main([*given, "--arch", "preactresnet18", "--widen-factor", "0.0625"]) == 1
    error = capsys.readouterr().err
    assert "1 of another shape (layer1.0.bn1.weight (5,) instead of (4,))" in error and error.count("\n") == 1


@pytest.mark.parametrize("layout", ["backdoorbench", "trojanzoo"])
def test_repaired_in_the_layout_in_which_it_came(theirs, tmp_path, layout):
    given = [*theirs(layout), "--output-dir", str(tmp_path / "out"), "--val-frac", "0.1"]
    steps = ["--nb-iter", "2", "--print-every", "2", "--batch-size", "32"]
    assert optimize_mask_cifar.main([*given, *steps]) == 0
    masks = ["--mask-file", str(tmp_path / "out/mask_values.txt")]
    assert prune_neuron_cifar.main([*given, *masks, "--pruning-by", "number", "--number", "40"]) == 0
    repaired = load_torch(tmp_path / "out/repaired_model.th")
    card = json.loads((tmp_path / "out/repaired_model.json").read_text())
    assert card["repaired_from"]["layout"] == layout and card["arch"] == LAYOUTS[layout][1]
    written = sorted(path.name for path in (tmp_path / "out").glob("repaired_model*.pt"))
    assert written == [f"repaired_model.{layout}.pt"]
    back, original = (read_checkpoint(p) for p in (tmp_path / f"out/{written[0]}", tmp_path / "theirs.pt"))
    assert back.layout == layout and same(dict(back.state_dict), dict(repaired))
    assert not same(dict(back.state_dict), dict(original.state_dict))
    assert same(back.with_weights(original.state_dict), original.content)


def test_overwriting_knows_the_second_file():
    for step in ("pruning_by_number", "pruning_by_threshold"):
        assert any(re.fullmatch(pattern, "repaired_model.backdoorbench.pt") for pattern in OUTPUTS[step].files)
    for step in ("train", "optimize"):
        assert any(re.fullmatch(pattern, "repaired_model.input-aware.pt") for pattern in OUTPUTS[step].derived)


def test_readers_are_tried_in_order():
    assert [read(backdoorbench()) is not None for read in READERS] == [True, False, False, False, True]
    assert all(read({"a": 1}) is None for read in READERS)


def test_a_file_that_contradicts_its_own_weights(tmp_path, capsys):
    torch.save({**backdoorbench(model=filled("resnet18")), "num_classes": 100}, tmp_path / "attack_result.pt")
    assert evaluate_cifar.main(["--checkpoint", str(tmp_path / "attack_result.pt"), "--dataset", "tiny"]) == 1
    assert "100 classes, but tiny has 10" in capsys.readouterr().err
