"""Smaller networks: the same outputs without the pruned channels, saved, loaded and measured."""

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import evaluate_cifar
import formats.repaired
import models.compact
import optimize_mask_cifar
import prune_neuron_cifar
from engine.cost import cost, images_per_second
from formats.cards import read_card, save_with_card
from formats.checkpoints import read_state_dict
from formats.network import build_network
from formats.outputs import OUTPUTS
from models import ARCHITECTURES, ModelConfig, build_model
from models.compact import compact
from models.neuron_layers import neuron_layers
from utils.config import InputCode
from utils.errors import InputError
from utils.signals import Interrupted

SIZE = (3, 16, 16)


def randomize(network, share=0.45):
    """Give BatchNorms statistics of their own and prune a share of their channels, with shifts of both signs."""
    torch.manual_seed(0)
    for layer in neuron_layers(network).values():
        layer.weight.data.uniform_(0.5, 1.5)
        layer.bias.data.normal_(0, 0.5)
        layer.running_mean.normal_(0, 0.2)
        layer.running_var.uniform_(0.5, 2)
        layer.weight.data[torch.rand(len(layer.weight)) < share] = 0
    return network.double().eval()


def same(network, smaller, size=SIZE):
    """Compare outputs in float64, on inputs that ``compact`` itself has not seen."""
    images = torch.randn(3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        expected, found = network(images), smaller(images)
    return torch.allclose(found, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


def parameters(network):
    return sum(each.numel() for each in network.parameters())


def shapes(network):
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


class Body(nn.Module):
    """A network of one convolution and one BatchNorm, and what a test makes of them."""

    def __init__(self, forward, width=8, **layers):
        super().__init__()
        self.conv, self.norm, self.own = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.own(self, x)


def one_layer(scales, shifts, *rest):
    """A convolution and a BatchNorm with these scales and shifts, and what follows them."""
    width = len(scales)
    network = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), *rest)
    randomize(network, 0)
    network[1].weight.data = torch.tensor(scales, dtype=torch.float64)
    network[1].bias.data = torch.tensor(shifts, dtype=torch.float64)
    return network


# ---- what is computed


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_computes_the_same_with_fewer_channels(arch, share):
    network = randomize(build_model(arch, 10, 1 / 8), share)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    smaller, dropped, obstacle = compact(network, (3, 32, 32))
    assert obstacle is None and dropped > 0 and parameters(smaller) < parameters(network)
    assert same(network, smaller, (3, 32, 32)) and same(network, smaller, (3, 32, 48)), "images of any size"
    assert shapes(smaller).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("share", [0, 1])
def test_nothing_and_everything_pruned(share):
    network = randomize(build_model("vgg19_bn", 10, 1 / 8), share)
    smaller, dropped, obstacle = compact(network, (3, 32, 32))
    assert obstacle is None and same(network, smaller, (3, 32, 32))
    widths = [layer.num_features for layer in neuron_layers(smaller).values()]
    assert set(widths) == {1} if share else widths == [layer.num_features for layer in neuron_layers(network).values()]
    assert bool(dropped) == bool(share)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_constants_are_exact_at_the_border_and_become_one_channel(mode):
    last = nn.Conv2d(6, 4, 3, padding=1, padding_mode=mode)
    network = one_layer([1, 0, 0, 0, 0, 1], [0.1, 2, 0.5, -1, 1, 0.3], nn.ReLU(), last)
    smaller, dropped, _ = compact(network, SIZE)
    assert same(network, smaller)
    assert dropped == 3 and smaller[3].in_channels == 3, "two that vary, one for the shifts above 0"
    assert smaller[1].bias.tolist() == [0.1, 2, 0.3], "the largest constant stays"
    assert len(smaller[0].weight) == smaller[0].out_channels == 3


def test_constants_of_zero_leave_nothing_behind():
    network = one_layer([1, 0, 0, 1], [0.1, -2, 0, 0.3], nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1))
    smaller, dropped, _ = compact(network, SIZE)
    assert dropped == 2 and smaller[3].in_channels == 2 and same(network, smaller)


def test_a_layer_of_zeros_keeps_one_channel():
    network = one_layer([0, 0, 0], [-1, -2, -3], nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1))
    smaller, dropped, _ = compact(network, SIZE)
    assert dropped == 2 and smaller[3].in_channels == 1 and same(network, smaller)


ACTIVATIONS = {
    "relu6": nn.ReLU6(), "leaky": nn.LeakyReLU(0.1), "silu": nn.SiLU(inplace=True), "gelu": nn.GELU(),
    "tanh": nn.Tanh(), "dropout": nn.Dropout(), "identity": nn.Identity(), "max-pool": nn.MaxPool2d(3, 2, 1),
    "average": nn.AvgPool2d(2), "adaptive": nn.AdaptiveAvgPool2d(5),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_may_stand_in_between(name):
    last = nn.Conv2d(6, 4, 3, padding=1)
    network = one_layer([1, 0, 0, 0, 0, 1], [0.1, 7, -0.5, -1, 1, 0.3], ACTIVATIONS[name], last)
    smaller, dropped, obstacle = compact(network, SIZE)
    assert obstacle is None and dropped == 3 and same(network, smaller)


def test_averages_over_padding_are_left():
    network = one_layer([1, 0, 0], [0.1, 2, 1], nn.AvgPool2d(3, 2, 1), nn.Conv2d(3, 4, 3))
    smaller, dropped, obstacle = compact(network, SIZE)
    assert (dropped, obstacle) == (0, None) and same(network, smaller)


FORWARDS = {
    "functions": lambda self, x: self.head(F.leaky_relu(F.max_pool2d(self.norm(self.conv(x)), 2), 0.1, inplace=True)),
    "methods": lambda self, x: self.head(self.norm(self.conv(x)).relu_()),
    "dropout": lambda self, x: self.head(F.dropout(F.silu(self.norm(self.conv(x))), 0.5, self.training)),
    "two consumers": lambda self, x: (lambda y: self.head(y) + self.other(y))(F.gelu(self.norm(self.conv(x)))),
    "flatten": lambda self, x: self.linear(F.relu(self.norm(self.conv(x))).flatten(1)),
    "torch.flatten": lambda self, x: self.linear(torch.flatten(F.relu(self.norm(self.conv(x))), 1)),
    "view": lambda self, x: (lambda y: self.linear(y.view(y.size(0), -1)))(F.relu(self.norm(self.conv(x)))),
    "reshape": lambda self, x: (lambda y: self.linear(y.reshape(y.shape[0], -1)))(F.relu(self.norm(self.conv(x)))),
    "pool to sizes": lambda self, x: (lambda y: self.few(F.avg_pool2d(y, y.shape[2:]).flatten(1)))(
        F.relu(self.norm(self.conv(x)))
    ),
    "sizes": lambda self, x: (lambda y: self.head(y) * y.size(2) + y.shape[0])(F.relu(self.norm(self.conv(x)))),
    "layer called by keyword elsewhere": lambda self, x: self.head(F.relu(self.norm(self.conv(input=x)))),
}


def body(forward):
    heads = {"head": nn.Conv2d(8, 4, 3, padding=1), "other": nn.Conv2d(8, 4, 3, padding=1)}
    linears = {"linear": nn.Linear(8 * 16 * 16, 5), "few": nn.Linear(8, 5)}
    return randomize(Body(forward, **heads, **linears))


@pytest.mark.parametrize("name", FORWARDS)
def test_networks_as_people_write_them(name):
    network = body(FORWARDS[name])
    smaller, dropped, obstacle = compact(network, SIZE)
    assert obstacle is None and same(network, smaller)
    assert (dropped > 0) == (name != "layer called by keyword elsewhere")


LEFT = {
    "residual": lambda self, x: (lambda y: self.head(F.relu(self.norm(y) + y)))(self.conv(x)),
    "added behind": lambda self, x: (lambda y: self.head(y) + y[:, :4])(F.relu(self.norm(self.conv(x)))),
    "concatenated": lambda self, x: self.wide(torch.cat([self.norm(self.conv(x)), self.conv(x)], 1)),
    "also returned": lambda self, x: (lambda y: self.head(y).sum() + y)(F.relu(self.norm(self.conv(x)))),
    "number of channels": lambda self, x: (lambda y: self.head(y) * y.shape[1])(F.relu(self.norm(self.conv(x)))),
    "channels and more": lambda self, x: (lambda y: self.head(y) * y.shape[1:][0])(F.relu(self.norm(self.conv(x)))),
    "from the back": lambda self, x: (lambda y: self.head(y) * y.size(-3))(F.relu(self.norm(self.conv(x)))),
    "softmax": lambda self, x: self.head(F.softmax(self.norm(self.conv(x)), 1)),
    "shuffled": lambda self, x: self.head(F.relu(self.norm(self.conv(x))).flip(1)),
    "size in numbers": lambda self, x: self.linear(F.relu(self.norm(self.conv(x))).view(-1, 2048)),
    "linear on the last dimension": lambda self, x: self.row(F.relu(self.norm(self.conv(x)))),
    "groups": lambda self, x: self.grouped(F.relu(self.norm(self.conv(x)))),
    "weights elsewhere": lambda self, x: self.head(F.relu(self.norm(self.conv(x)))) * self.conv.weight.sum(),
    "used twice": lambda self, x: self.head(F.relu(self.norm(self.conv(x)))) + self.head(self.norm(self.conv(x))),
    "own code": lambda self, x: self.head(F.relu(self.norm(self.conv(x)))) * (1 if x.sum() > 0 else 2),
    "input as weight": lambda self, x: F.conv2d(F.relu(self.norm(self.conv(x))), self.head.weight),
}
UNTRACED = {"weights elsewhere", "used twice", "own code", "concatenated"}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_understood_is_left(name):
    network = body(LEFT[name])
    network.wide, network.row = nn.Conv2d(16, 4, 3).double(), nn.Linear(16, 5).double()
    network.grouped = nn.Conv2d(8, 4, 3, groups=2).double()
    smaller, dropped, obstacle = compact(network, SIZE)
    assert smaller is not network and shapes(smaller) == shapes(network) and same(network, smaller)
    assert dropped == 0 and bool(obstacle) == (name in UNTRACED)


def test_hooks_and_half_precision_are_left():
    hooked = body(FORWARDS["functions"])
    hooked.norm.register_forward_hook(lambda layer, inputs, output: output + 1)
    half = body(FORWARDS["functions"]).bfloat16()
    for network in (hooked, half):
        smaller, dropped, obstacle = compact(network, SIZE)
        assert dropped == 0 and obstacle and shapes(smaller) == shapes(network)
    assert same(hooked, compact(hooked, SIZE).network)


def test_a_weight_of_two_layers_stays_the_weight_of_both():
    network = body(lambda self, x: self.head(F.relu(self.norm(self.conv(x)))) + self.other(self.conv2(x)))
    network.conv2 = nn.Conv2d(3, 8, 3, padding=1).double()
    network.conv2.weight, network.other.weight = network.conv.weight, network.head.weight
    network.norm.weight.data[:3], network.norm.bias.data[:3] = 0, torch.tensor([1.0, 2.0, 3.0])
    smaller, dropped, _ = compact(network, SIZE)
    assert dropped > 0 and same(network, smaller)


def test_zeros_pass_through_a_depthwise_convolution_and_others_do_not():
    depthwise = [nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.ReLU()]
    network = one_layer([1, 0, 0, 0], [0.1, -2, 2, -1], nn.ReLU(), *depthwise, nn.Conv2d(4, 4, 3, padding=1))
    network[3].bias.data[1:] = torch.tensor([3.0, 3.0, -9.0])
    smaller, dropped, obstacle = compact(network, SIZE)
    kept = smaller[3]
    assert dropped == 1 and (kept.in_channels, kept.out_channels, kept.groups) == (3, 3, 3)
    assert obstacle is None and same(network, smaller)


def test_torchvision_and_an_mlp():
    network = randomize(torchvision.models.resnet18(num_classes=4))
    smaller, dropped, _ = compact(network, (3, 40, 40))
    assert dropped > 0 and same(network, smaller, (3, 40, 40))
    layers = [nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 9), nn.BatchNorm1d(9)]
    mlp = randomize(nn.Sequential(nn.Flatten(), *layers, nn.ReLU(), nn.Linear(9, 3)))
    smaller, dropped, _ = compact(mlp, (3, 2, 2))
    assert dropped > 0 and smaller[5].in_features < 20 and smaller[8].in_features < 9 and same(mlp, smaller, (3, 2, 2))


def test_neurons_of_convolutions_and_linear_layers():
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.Flatten(), nn.Linear(1280, 4)]
    network = nn.Sequential(*layers).double().eval()
    network[0].weight.data[:3], network[0].bias.data[:3] = 0, torch.tensor([1.0, 2.0, -1.0])
    network[2].weight.data[0], network[2].weight.data[1, 0] = 0, 0
    smaller, dropped, obstacle = compact(network, SIZE)
    assert (dropped, obstacle) == (2, None) and same(network, smaller)
    assert (smaller[2].in_channels, smaller[2].out_channels, smaller[4].in_features) == (4, 5, 1280)


def test_training_mode_and_gradients_are_those_of_a_network_for_evaluation():
    network = body(FORWARDS["flatten"]).train()
    network.conv.weight.requires_grad_(False)
    smaller, dropped, _ = compact(network, SIZE)
    assert dropped > 0 and not smaller.training and network.training
    assert not smaller.conv.weight.requires_grad and smaller.linear.weight.requires_grad


def test_a_copy_that_computes_something_else_is_not_returned(monkeypatch):
    network = body(FORWARDS["functions"])
    monkeypatch.setattr(models.compact, "_constants", lambda graph, chain: torch.zeros(chain.width))
    smaller, dropped, obstacle = compact(network, SIZE)
    assert dropped == 0 and shapes(smaller) == shapes(network) and "computes something else (by up to" in obstacle
    monkeypatch.undo()
    assert "cannot be compared (RuntimeError: " in compact(network, (5, 16, 16)).obstacle, (
        "images that the network itself does not take"
    )


# ---- what it costs


def test_parameters_and_flops_are_counted_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 5)).eval()
    flops = 2 * (3 * 9 * 4 * 64 + 4 * 64 * 5)
    assert cost(network, (3, 8, 8)) == {"parameters": 3 * 9 * 4 + 4 + 8 + 4 * 64 * 5 + 5, "flops": flops}


def test_speed_is_measured_in_turn(monkeypatch):
    calls, now = [], [0.0]

    def network(name, seconds):
        def run(images):
            calls.append(name)
            now[0] += seconds

        return run

    monkeypatch.setattr("engine.cost.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("engine.cost.SPEED_SECONDS", 4.0)
    speeds = images_per_second([network("a", 0.5), network("b", 0.25)], torch.zeros(8, 3, 2, 2))
    assert speeds == [16, 32] and "".join(calls) == "ab" * 6


# ---- files


@pytest.fixture
def saved(tmp_path):
    """A compact network in a file with a card, and the network it was made from."""
    network = randomize(build_model("MobileNetV2", 10, 1 / 8)).float()
    smaller = compact(network, SIZE).network
    card = {"arch": "MobileNetV2", "widen_factor": 0.125, "num_classes": 10, "dataset": "tiny", "compact": True}
    save_with_card(tmp_path / "compact_model.th", smaller.state_dict(), card)
    return tmp_path / "compact_model.th", smaller


def load(path, state_dict, compact=True):
    return build_network(path, state_dict, ModelConfig("MobileNetV2", 0.125), 10, compact)


def test_a_compact_network_comes_back(saved):
    path, smaller = saved
    network = load(path, read_state_dict(path))
    assert shapes(network) == shapes(smaller) and same(network.double(), smaller.double())
    assert compact(network, SIZE).dropped == 0, "nothing is left to drop"
    with pytest.raises(InputError, match="does not fit this network"):
        load(path, read_state_dict(path), compact=False)


def test_a_network_that_is_not_compact_loads_under_either_name(saved):
    path, _ = saved
    state_dict = build_model("MobileNetV2", 10, 1 / 8).state_dict()
    assert shapes(load(path, state_dict)) == shapes(load(path, state_dict, compact=False))


FAULTS = {
    "no channel": lambda tensor: tensor[:0],
    "fewer channels than the next layer takes": lambda tensor: tensor[:-1],
    "more channels than the architecture": lambda tensor: tensor.repeat(9, 1, 1, 1),
    "a number": lambda tensor: tensor.sum(),
    "a vector": lambda tensor: tensor.flatten(),
    "another kernel": lambda tensor: tensor.repeat(1, 1, 3, 3),
    "sparse": lambda tensor: tensor.to_sparse(),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor]),
    "gone": None,
}


@pytest.mark.parametrize("layer", ["layers.1.conv1.weight", "layers.1.conv2.weight", "layers.1.conv3.weight"])
@pytest.mark.parametrize("fault", FAULTS)
def test_shapes_that_do_not_fit_are_one_line(saved, fault, layer):
    path, _ = saved
    state_dict = read_state_dict(path)
    tensor = state_dict.pop(layer)
    if FAULTS[fault]:
        state_dict[layer] = FAULTS[fault](tensor)
    with pytest.raises(InputError, match=r"layers\.1\.") as error:
        load(path, state_dict)
    assert "\n" not in str(error.value)


def test_channels_of_a_residual_stream_must_be_all_there(saved):
    path, _ = saved
    state_dict = read_state_dict(path)
    for name in ("conv3.weight", "bn3.weight", "bn3.bias", "bn3.running_mean", "bn3.running_var"):
        state_dict[f"layers.2.{name}"] = state_dict[f"layers.2.{name}"][:1]
    with pytest.raises(InputError, match="5 of another shape"):
        load(path, state_dict)


# ---- step 3 and the scripts that read what it writes


def step_3(folder, trained, *more, checkpoint="last_model.th"):
    source = ["--checkpoint", f"{trained}/{checkpoint}", "--trigger-info", f"{trained}/trigger_info.th"]
    options = ["--val-frac", "0.1", "--pruning-max", "0.6", "--pruning-step", "0.3", "--precision", "fp32"]
    masks = ["--mask-file", f"{trained}/mask_values.txt"]
    return prune_neuron_cifar.main(["--output-dir", str(folder), *source, *masks, *options, *more])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("engine.cost.SPEED_SECONDS", 0.0)


@pytest.fixture
def plain(trained, tmp_path):
    """A folder of steps 1 and 2 with masks of which 0.3 prunes a third."""
    folder = shutil.copytree(trained, tmp_path / "plain")
    lines = (folder / "mask_values.txt").read_text().splitlines()
    values = [line.rpartition("\t")[0] + f"\t{0.2 if number % 3 else 0.9:.4f}" for number, line in enumerate(lines[1:])]
    (folder / "mask_values.txt").write_text("\n".join([lines[0], *values, ""]))
    (folder / "mask_values.json").unlink()
    return folder


def test_step_3_saves_a_smaller_network_that_measures_the_same(plain, tmp_path, capsys):
    out = tmp_path / "out"
    assert step_3(out, plain, "--threshold", "0.3", "--compact") == 0
    lines = capsys.readouterr().out.splitlines()
    said = next(line for line in lines if line.startswith("compact_model.th: "))
    cards = [read_card(out / f"{name}_model.th") for name in ("repaired", "compact")]
    assert cards[1]["compact"] is True and "compact" not in cards[0] and cards[0]["metrics"] == cards[1]["metrics"]
    figures = re.search(r"(\d+) channels dropped; parameters ([\d,]+) -> ([\d,]+), MFLOPs an image", said)
    assert int(figures[1]) > 50 and int(figures[3].replace(",", "")) == cards[1]["parameters"]
    states = [read_state_dict(out / f"{name}_model.th") for name in ("repaired", "compact")]
    assert sum(each.numel() for each in states[1].values()) < 0.7 * sum(each.numel() for each in states[0].values())
    after = next(line for line in lines if line.startswith("after: ")).removeprefix("after:  ")
    assert said.endswith(after)

    measured = []
    for name in ("repaired", "compact"):
        source = ["--checkpoint", f"{out}/{name}_model.th", "--trigger-info", f"{plain}/trigger_info.th"]
        assert evaluate_cifar.main([*source, "--precision", "fp32"]) == 0
        measured.append(capsys.readouterr().out.splitlines()[-1])
    assert measured[0] == measured[1] and measured[0].startswith(after)


def test_a_step_without_the_flag_writes_the_same_and_no_smaller_network(plain, tmp_path):
    assert step_3(tmp_path / "with", plain, "--compact") == 0
    assert step_3(tmp_path / "without", plain) == 0
    names = {path.name for path in (tmp_path / "with").iterdir()}
    assert names - {path.name for path in (tmp_path / "without").iterdir()} == {
        "compact_model.th",
        "compact_model.json",
    }
    repaired = [(tmp_path / name / "repaired_model.th").read_bytes() for name in ("with", "without")]
    assert repaired[0] == repaired[1]


def test_steps_2_and_3_repair_a_compact_network(plain, tmp_path):
    assert step_3(tmp_path / "out", plain, "--threshold", "0.3", "--compact") == 0
    small = tmp_path / "out" / "compact_model.th"
    again = ["--output-dir", str(tmp_path / "again"), "--checkpoint", str(small), "--val-frac", "0.1"]
    assert optimize_mask_cifar.main([*again, "--nb-iter", "2", "--print-every", "2", "--batch-size", "32"]) == 0
    masks = str(tmp_path / "again" / "mask_values.txt")
    assert prune_neuron_cifar.main([*again, "--mask-file", masks, "--number", "9", "--pruning-step", "0.9"]) == 0
    card = read_card(tmp_path / "again" / "repaired_model.th")
    assert card["compact"] is True and card["repair"]["pruned_neurons"] == 9
    evaluation = ["--checkpoint", f"{tmp_path}/again/repaired_model.th", "--precision", "fp32"]
    assert evaluate_cifar.main(evaluation) == 0


def test_a_card_that_lies_is_one_line(plain, tmp_path, capsys):
    assert step_3(tmp_path / "out", plain, "--threshold", "0.3", "--compact") == 0
    card = tmp_path / "out" / "compact_model.json"
    content = json.loads(card.read_text())
    for value, message in (("yes", "not a card (compact is 'yes')"), (False, "does not fit this network")):
        card.write_text(json.dumps({**content, "compact": value}))
        capsys.readouterr()
        assert evaluate_cifar.main(["--checkpoint", f"{tmp_path}/out/compact_model.th"]) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_network_that_cannot_be_traced_is_saved_as_it_is(tmp_path, capsys):
    code = tmp_path / "net.py"
    code.write_text(
        "from torch import nn\n\n\nclass Own(nn.Sequential):\n    def forward(self, x):\n"
        "        return super().forward(x if x.sum() > 0 else x + 0)\n\n\ndef build(num_classes):\n"
        "    return Own(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, num_classes, 30), nn.Flatten())\n"
    )
    own = ["--model", f"{code}:build", "--dataset", "tiny", "--val-frac", "0.1", "--precision", "fp32"]
    torch.manual_seed(0)
    network = ModelConfig(model=InputCode(f"{code}:build")).build(10)
    torch.save(network.state_dict(), tmp_path / "own.th")
    rows = [f"{index}\t1\t{index}\t0.1000" for index in range(4)]
    (tmp_path / "masks.txt").write_text("\n".join(["No \t Layer Name \t Neuron Idx \t Mask Score", *rows, ""]))
    out = ["--output-dir", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "own.th")]
    assert prune_neuron_cifar.main([*out, *own, "--mask-file", str(tmp_path / "masks.txt"), "--compact"]) == 0
    assert "0 channels dropped, as its layers cannot be told apart" in capsys.readouterr().out
    same_as = ["--checkpoint", str(tmp_path / "out" / "compact_model.th"), "--model", f"{code}:build"]
    assert evaluate_cifar.main([*same_as, "--precision", "fp32"]) == 0


def test_overwriting_takes_the_smaller_network_along(plain, tmp_path, capsys):
    out = tmp_path / "out"
    assert step_3(out, plain, "--compact") == 0
    assert step_3(out, plain, "--compact", "--resume") == 0 and "this run is complete" in capsys.readouterr().out
    assert step_3(out, plain, "--resume") == 1, "a run without the flag is another one"
    for name in ("repaired_model.th", "repaired_model.json", "pruning_by_threshold.txt"):
        (out / name).unlink()
    capsys.readouterr()
    assert step_3(out, plain, "--compact") == 1 and "compact_model.th is there already" in capsys.readouterr().err
    assert step_3(out, plain, "--overwrite") == 0
    assert not {"compact_model.th", "compact_model.json"} & {path.name for path in out.iterdir()}
    for step in ("train", "optimize"):
        assert any(re.fullmatch(pattern, "compact_model.th") for pattern in OUTPUTS[step].derived)


def test_an_interruption_before_the_smaller_network_is_saved(plain, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise Interrupted

    assert step_3(tmp_path / "through", plain, "--compact") == 0
    with monkeypatch.context() as patch:
        patch.setattr(formats.repaired, "compact", interrupt)
        assert step_3(tmp_path / "broken", plain, "--compact") == 130
    assert (tmp_path / "broken" / "repaired_model.th").exists()
    assert step_3(tmp_path / "broken", plain, "--compact", "--resume") == 0
    for name in ("repaired_model.th", "compact_model.th", "pruning_by_threshold.txt"):
        assert (tmp_path / "through" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
