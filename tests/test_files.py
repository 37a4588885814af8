import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data.triggers import Trigger
from engine.evaluation import Metrics, Report
from formats.cards import read_card, save_with_card
from formats.checkpoints import load_strictly, read_state_dict
from formats.layouts import read_content
from formats.mask_file import check_source, read_masks, write_masks
from formats.pruning_file import write_sweep
from formats.trigger_file import load_trigger, save_trigger
from models import Neuron, build_model
from utils.errors import InputError
from utils.files import card_path, load_torch, save_torch, write_bytes

# ---- hostile and damaged files


class Hostile:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def as_zip(path, content):
    torch.save(content, path)


def as_legacy(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def as_pickle(path, content):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [as_zip, as_legacy, as_pickle])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"state_dict": {"w": torch.ones(1)}, "opt": x}])
def test_code_in_a_file_never_runs(tmp_path, write, wrap):
    path, proof = tmp_path / "model.th", tmp_path / "proof"
    write(path, wrap(Hostile(proof)))
    for read in (load_torch, read_state_dict, lambda path: load_trigger(path, 10)):
        with pytest.raises(InputError) as caught:
            read(path)
        message = str(caught.value)
        assert "model.th" in message and "\n" not in message
        assert write is as_pickle or "open" in message
    assert not proof.exists()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"hello", bytes(range(256)), pickle.dumps([1, 2])[:-1]]
)
def test_damaged_files_are_one_line(tmp_path, content):
    path = tmp_path / "model.th"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_state_dict(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_checkpoint(tmp_path):
    path = tmp_path / "model.th"
    torch.save(build_model("resnet18", 10, 1 / 16).state_dict(), path)
    whole = path.read_bytes()
    as_legacy(path, torch.load(path))
    for content in (whole, path.read_bytes()):
        for share in (0.01, 0.1, 0.5, 0.99):
            path.write_bytes(content[: int(share * len(content))])
            with pytest.raises(InputError):
                read_state_dict(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_torch(tmp_path / "none.th")
    with pytest.raises(InputError):
        load_torch(tmp_path)


# ---- triggers


def trigger_arrays(count=1):
    rng = np.random.default_rng(0)
    return {
        "trigger_pattern": rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        "trigger_mask": np.ones((count, 32, 32, 1)),
        "trigger_alpha": np.array([0.2]),
        "poison_target": np.array([3] * count),
        "data_index": np.arange(5),
    }


def numpy_1(content):
    """Rewrite a saved file as NumPy 1 would have named its modules."""
    source, target = io.BytesIO(), io.BytesIO()
    torch.save(content, source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data.replace(b"numpy._core", b"numpy.core") if name.endswith("data.pkl") else data)
    return target.getvalue()


@pytest.mark.parametrize("era", ["numpy 1", "numpy 2"])
@pytest.mark.parametrize("count", [1, 4])
def test_released_trigger_files_are_read(tmp_path, era, count):
    path, arrays = tmp_path / "trigger_info.th", trigger_arrays(count)
    arrays["trigger_alpha"] = 0.2 if era == "numpy 1" else np.float64(0.2)
    torch.save(arrays, path)
    if era == "numpy 1":
        assert b"numpy.core" in numpy_1(arrays)
        path.write_bytes(numpy_1(arrays))
    trigger = load_trigger(path, 10)
    assert np.array_equal(trigger.pattern.numpy(), arrays["trigger_pattern"])
    assert trigger.alpha == 0.2 and trigger.target.tolist() == [3] * count


def test_trigger_round_trip(tmp_path):
    path = tmp_path / "trigger_info.th"
    parts = (torch.zeros(1, 32, 32, 1, dtype=torch.uint8), torch.ones(1, 32, 32, 1).double(), 1.0)
    save_trigger(path, Trigger(*parts, torch.tensor([7])), torch.tensor([1, 2]))
    content = torch.load(path)  # as anybody would
    assert set(content) == {"trigger_pattern", "trigger_mask", "trigger_alpha", "poison_target", "data_index"}
    assert load_trigger(path, 10).target.tolist() == [7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trigger_pattern": np.zeros((32, 32, 3), np.uint8)}, "expected \\(N, H, W, C\\)"),
        ({"trigger_mask": np.ones((1, 28, 28, 1))}, "28"),
        ({"trigger_mask": np.full((1, 32, 32, 1), 1.5)}, "trigger_mask reaches"),
        ({"trigger_mask": np.full((1, 32, 32, 1), np.nan)}, "trigger_mask holds NaN"),
        ({"trigger_alpha": np.array([20.0])}, "trigger_alpha reaches"),
        ({"poison_target": np.array([10])}, "poison_target reaches"),
        ({"trigger_pattern": "text"}, "no array of numbers"),
        ({"trigger_pattern": [[1, 2], [3]]}, "no array of numbers"),
        ({"trigger_pattern": torch.ones(1, 32, 32, 3).to_sparse()}, "no array of numbers"),
        ({"trigger_pattern": np.full((1, 32, 32, 3), 0.5)}, "not whole numbers"),
        ({"poison_target": np.array([2.7])}, "not whole numbers"),
        ({"trigger_alpha": torch.tensor(1j)}, "no array of numbers"),
        ({"data_index": np.array([-1])}, "data_index reaches"),
        ({"trigger_mode": "multiply"}, "trigger_mode is 'multiply'"),
        ({"trigger_mode": torch.tensor(1)}, "trigger_mode is"),
        ({"trigger_mode": "add", "trigger_pattern": np.full((1, 32, 32, 3), -300)}, "trigger_pattern reaches"),
        ({"trigger_pattern": np.full((1, 32, 32, 3), 300)}, "trigger_pattern reaches"),
    ],
)
def test_bad_trigger_entries(tmp_path, changes, message):
    path = tmp_path / "trigger_info.th"
    torch.save({**trigger_arrays(), **changes}, path)
    with pytest.raises(InputError, match=message):
        load_trigger(path, 10)


def test_added_triggers_round_trip(tmp_path):
    pattern = torch.linspace(-40, 40, 1024).view(1, 32, 32, 1)
    parts = pattern, torch.ones(1, 32, 32, 1), 1.0, torch.tensor([7])
    save_trigger(tmp_path / "trigger_info.th", Trigger(*parts, mode="add"), torch.tensor([1, 2]))
    trigger = load_trigger(tmp_path / "trigger_info.th", 10)
    assert trigger.mode == "add" and torch.equal(trigger.pattern, pattern)


def test_a_large_trigger_keeps_its_data_types(tmp_path):
    """One pattern and mask an image: as float64 a file of 72 MB would take half a gigabyte."""
    parts = torch.zeros(7, 32, 32, 3, dtype=torch.uint8), torch.rand(7, 32, 32, 1), 1.0, torch.zeros(7).long()
    save_trigger(tmp_path / "trigger_info.th", Trigger(*parts), torch.zeros(0))
    trigger = load_trigger(tmp_path / "trigger_info.th", 10)
    assert trigger.pattern.dtype == torch.uint8 and trigger.mask.dtype == torch.float32
    assert torch.equal(trigger.mask, parts[1])


def test_trigger_file_without_an_entry(tmp_path):
    path = tmp_path / "trigger_info.th"
    torch.save({"trigger_pattern": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="not a trigger file"):
        load_trigger(path, 10)


# ---- checkpoints


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {}}},
        lambda s: {"state_dict": {"model": s}},
        lambda s: {"netC": s, "netG": {"w": torch.ones(1)}},
        lambda s: {f"module.{name}": tensor for name, tensor in s.items()},
        lambda s: {"net": {f"model.{name}": tensor for name, tensor in s.items()}},
        lambda s: {f"_orig_mod.{name}": tensor for name, tensor in s.items()},
        lambda s: {f"_orig_mod.module.{name}": tensor for name, tensor in s.items()},
        lambda s: {"n_averaged": torch.tensor(3), **{f"module.{name}": tensor for name, tensor in s.items()}},
    ],
)
def test_known_layouts_are_unwrapped(network, wrap):
    fresh = build_model("resnet18", 10, 1 / 16)
    load_strictly(fresh, read_content(wrap(network.state_dict()), "x.th").state_dict, "x.th")
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), network.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("content", [{}, [1], {"state_dict": 3}, {"epoch": 1}, torch.ones(2)])
def test_no_state_dict(content):
    with pytest.raises(InputError, match="no state_dict"):
        read_content(content, "x.th")


def test_strict_loading(network):
    state = network.state_dict()
    fresh = build_model("resnet18", 10, 1 / 16)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    cases = [
        ({k: v for k, v in state.items() if not k.startswith("layer4")}, "30 missing \\(layer4.0.conv1.weight, layer4"),
        ({**state, "extra": torch.ones(1)}, "1 unexpected \\(extra\\)"),
        ({**state, "linear.weight": torch.ones(3, 4)}, r"1 of another shape \(linear.weight \(3, 4\) instead of"),
        ({"a": torch.ones(1)}, "missing .* unexpected"),
        ({**state, "bn1.bias": torch.ones(4, dtype=torch.int64)}, "bn1.bias is a torch.int64 tensor"),
        ({**state, "bn1.bias": torch.ones(4, dtype=torch.complex64)}, "torch.complex64"),
        ({**state, "bn1.bias": torch.ones(4).to_sparse()}, "torch.sparse_coo"),
        ({**state, "bn1.bias": torch.ones(4, device="meta")}, "bn1.bias is no dense tensor"),
        ({**state, "bn1.bias": torch.full((4,), 1e300, dtype=torch.float64)}, "NaN or infinite"),
        ({**state, "bn1.bias": torch.full((4,), float("nan"))}, "bn1.bias holds 4 values that are NaN"),
    ]
    for bad, message in cases:
        with pytest.raises(InputError, match=message):
            load_strictly(fresh, bad, "x.th")
        assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())


def test_card_goes_with_its_file(tmp_path, network):
    path = tmp_path / "model.th"
    assert read_card(path) is None
    save_with_card(path, network.state_dict(), {"arch": "resnet18"})
    assert read_card(path)["arch"] == "resnet18"
    saved = torch.load(path)
    assert list(saved) == list(network.state_dict()) and all(t.is_contiguous() for t in saved.values())
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError, match="damaged or replaced"):
        read_card(path)
    for text, message in (("no json", "not JSON"), ("[]", "JSON object"), ("{}", "not a card .no card_version")):
        card_path(path).write_text(text)
        with pytest.raises(InputError, match=message):
            read_card(path)


def test_a_card_may_name_what_is_not_known_here(tmp_path, network):
    """Networks and datasets from elsewhere have cards too; whoever has to build one refuses it then."""
    path = tmp_path / "model.th"
    save_with_card(path, network.state_dict(), {"arch": "alexnet", "dataset": "svhn", "num_classes": 43})
    assert read_card(path)["arch"] == "alexnet"


def test_a_run_killed_between_card_and_checkpoint_leaves_no_file_without_a_card(tmp_path, network, monkeypatch):
    path, original = tmp_path / "model.th", Path.replace

    def killed_after_one(source, target):
        result = original(source, target)
        monkeypatch.setattr(Path, "replace", dead)
        return result

    def dead(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed_after_one)
    with pytest.raises(KeyboardInterrupt):
        save_with_card(path, network.state_dict(), {})
    assert not path.exists() and card_path(path).exists()
    monkeypatch.setattr(Path, "replace", original)
    save_with_card(path, network.state_dict(), {})
    monkeypatch.setattr(Path, "replace", killed_after_one)
    with pytest.raises(KeyboardInterrupt):
        save_with_card(path, {"other": torch.ones(1)}, {})
    with pytest.raises(InputError, match="damaged or replaced"):
        read_card(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"arch": ["resnet18"]},
        {"widen_factor": "1"},
        {"widen_factor": 0},
        {"num_classes": "10"},
        {"dataset": 3},
        {"split": None},
        {"split": {"file": 5}},
        {"normalization": None},
        {"normalization": {"mean": [0.5, 0.5], "std": [1, 1, 1]}},
        {"normalization": {"std": [0, 1, 1]}},
        {"normalization": {"std": "abc"}},
        {"sha256": 5},
        {"card_version": 99},
    ],
)
def test_cards_with_wrong_entries(tmp_path, network, entry):
    path = tmp_path / "model.th"
    save_with_card(path, network.state_dict(), {})
    card_path(path).write_text(json.dumps({**json.loads(card_path(path).read_text()), **entry}))
    with pytest.raises(InputError) as caught:
        read_card(path)
    assert "\n" not in str(caught.value)


# ---- writing


def test_same_content_same_bytes(tmp_path, network):
    save_torch(tmp_path / "a.th", network.state_dict())
    save_torch(tmp_path / "other name.th", network.state_dict())
    assert (tmp_path / "a.th").read_bytes() == (tmp_path / "other name.th").read_bytes()


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ---- text files


def test_mask_file_bytes(tmp_path):
    path = tmp_path / "mask_values.txt"
    write_masks(path, [Neuron("bn1", 0, 1.0), Neuron("layer4.0.shortcut.1", 17, 0.12345)], "abc")
    assert path.read_bytes() == (
        b"No \t Layer Name \t Neuron Idx \t Mask Score \n"
        b"0 \t bn1 \t 0 \t 1.0000 \n"
        b"1 \t layer4.0.shortcut.1 \t 17 \t 0.1235 \n"
    )


def all_neurons(network):
    return [
        Neuron(name, index, index / 100)
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
        for index in range(module.num_features)
    ]


def test_mask_file_round_trip(tmp_path, network):
    neurons = all_neurons(network)
    write_masks(tmp_path / "m.txt", neurons, "abc")
    check_source(tmp_path / "m.txt", "abc")
    with pytest.raises(InputError, match="another checkpoint"):
        check_source(tmp_path / "m.txt", "abd")
    assert read_masks(tmp_path / "m.txt", network) == neurons


def test_mask_file_that_does_not_fit(tmp_path, network):
    path, neurons = tmp_path / "mask_values.txt", all_neurons(network)
    wrong = [
        (neurons[:-1], "299 neurons, but the network has 300"),
        ([*neurons, neurons[0]], "301 neurons"),
        ([*neurons[:-1], Neuron("layer9.bn", 0, 0.5)], "layer"),
        ([*neurons[:-1], neurons[-1]._replace(mask=1.5)], "outside 0..1"),
        ([*neurons[:-1], neurons[-1]._replace(mask=float("nan"))], "outside 0..1"),
    ]
    for bad, message in wrong:
        write_masks(path, bad, "abc")
        with pytest.raises(InputError, match=message):
            read_masks(path, network)
    for text in ("", "nonsense\n", "No \t Layer Name \t Neuron Idx \t Mask Score \n1 \t bn1 \n"):
        path.write_text(text)
        with pytest.raises(InputError, match="mask_values"):
            read_masks(path, network)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="save it as UTF-8"):
        read_masks(path, network)
    with pytest.raises(InputError, match="step 2"):
        read_masks(tmp_path / "none.txt", network)


def test_sweep_file_bytes(tmp_path):
    clean, triggered = Metrics(0.5, 0.9), Metrics(1.25, 0.33333)
    rows = [
        (0, None, None, Report(clean, triggered, clean)),
        (3, Neuron("bn1", 2, 0.14), 0.15, Report(clean, None, clean)),
    ]
    write_sweep(tmp_path / "p.txt", rows)
    assert (tmp_path / "p.txt").read_bytes() == (
        b"No \t Layer Name \t Neuron Idx \t Mask \t PoisonLoss \t PoisonACC \t CleanLoss \t CleanACC\n"
        b"0 \t None \t None \t None \t 1.2500 \t 0.3333 \t 0.5000 \t 0.9000\n"
        b"3 \t bn1 \t 2 \t 0.15 \t nan \t nan \t 0.5000 \t 0.9000\n"
    )
