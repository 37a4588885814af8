import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from defenses.anp import AnpConfig, apply_masks, optimize_masks
from formats.mask_file import read_masks, write_masks
from models import (
    ARCHITECTURES,
    NoisyBatchNorm,
    build_model,
    convert_noisy,
    mask_values,
    neurons_up_to,
    noisy_layers,
)
from models.neurons import prune_neurons, sort_neurons
from models.resnet import Shortcut
from utils.errors import InputError

NEURONS = {
    "resnet18": 4800,
    "resnet34": 8512,
    "resnet50": 26560,
    "resnet101": 52672,
    "resnet152": 75712,
    "preactresnet18": 3392,
    "vgg19_bn": 5504,
    "MobileNetV2": 17544,
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_neuron_count_is_the_published_one(arch):
    with torch.device("meta"):
        norms = [m for m in build_model(arch).modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(norm.num_features for norm in norms) == NEURONS[arch]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_forward_and_widen_factor(arch):
    narrow, wide = build_model(arch, 7, 0.125), build_model(arch, 7, 0.25)
    assert narrow.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    first = next(m for m in wide.modules() if isinstance(m, nn.BatchNorm2d))
    published = {"MobileNetV2": 32}.get(arch, 64)
    assert first.num_features == published // 4
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in wide.parameters())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "preactresnet18", "vgg19_bn", "MobileNetV2"])
@pytest.mark.parametrize("size", [(64, 64), (48, 32)])
def test_any_image_size(arch, size):
    assert build_model(arch, 7, 0.125).eval()(torch.randn(2, 3, *size)).shape == (2, 7)


def test_state_dict_names_are_the_published_ones():
    names = {arch: set(build_model(arch, 10, 0.0625).state_dict()) for arch in ("resnet18", "resnet50")}
    for name in (
        "conv1.weight",
        "bn1.running_var",
        "layer1.0.conv1.weight",
        "layer4.1.bn2.weight",
        "layer2.0.shortcut.0.weight",
        "layer2.0.shortcut.1.bias",
        "linear.weight",
    ):
        assert name in names["resnet18"]
    assert "layer1.0.shortcut.0.weight" not in names["resnet18"]
    assert {"layer1.0.conv3.weight", "layer1.0.shortcut.1.weight"} <= names["resnet50"]
    vgg = set(build_model("vgg19_bn", 10, 0.0625).state_dict())
    assert {"features.0.weight", "features.0.bias", "features.1.running_mean", "classifier.weight"} <= vgg
    assert not {name for name in vgg if name.startswith("features.2.")}
    preact = set(build_model("preactresnet18", 10, 0.0625).state_dict())
    assert {"conv1.weight", "layer1.0.bn1.weight", "layer2.0.shortcut.0.weight", "linear.bias"} <= preact
    assert not {name for name in preact if name.startswith(("bn", "layer1.0.shortcut", "layer2.0.shortcut.1"))}
    mobile = set(build_model("MobileNetV2", 10, 0.25).state_dict())
    assert {"layers.0.shortcut.1.weight", "layers.16.bn3.weight", "conv2.weight", "bn2.bias", "linear.bias"} <= mobile


def test_the_shortcut_of_a_preactivation_block_starts_behind_its_first_batchnorm():
    torch.manual_seed(0)
    network = build_model("preactresnet18", 10, 0.0625).eval()
    block = network.layer2[0]
    block.conv2.weight.data.zero_()
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(block(x), block.shortcut[0](block.bn1(x).relu()))
    plain = network.layer1[0]
    plain.conv2.weight.data.zero_()
    assert torch.equal(plain(x), x)


@pytest.mark.parametrize("kwargs", [{"arch": "resnet9"}, {"widen_factor": 0}, {"num_classes": 0}])
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError):
        build_model(**{"arch": "resnet18", **kwargs})


INPUTS = {nn.BatchNorm1d: (8, 5), nn.BatchNorm2d: (8, 5, 4, 4), nn.BatchNorm3d: (4, 5, 3, 4, 2)}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("training", [True, False])
def test_equals_plain_batchnorm_at_mask_one(kind, training):
    torch.manual_seed(0)
    plain = kind(5).train(training)
    nn.init.uniform_(plain.weight)
    nn.init.normal_(plain.bias)
    plain.running_mean.normal_()
    noisy = convert_noisy(plain)
    x = torch.randn(INPUTS[kind])
    before = plain.running_mean.clone()
    assert torch.equal(noisy(x), plain(x))
    noisy.perturbed = True  # without noise it changes nothing
    assert torch.equal(noisy(x), copy.deepcopy(plain)(x))
    assert torch.equal(noisy.running_mean, before), "running statistics must not drift"


def test_effective_parameters():
    plain = nn.BatchNorm2d(3).eval()
    plain.weight.data = torch.tensor([1.0, 2.0, 3.0])
    plain.bias.data = torch.tensor([0.5, -1.0, 2.0])
    noisy = convert_noisy(plain).eval()
    noisy.mask = torch.tensor([0.5, 1.0, 0.0])
    noisy.weight_noise = torch.tensor([0.4, -0.4, 0.1])
    noisy.bias_noise = torch.tensor([-0.2, 0.3, 0.4])
    x = torch.randn(2, 3, 4, 4)

    def expected(weight, bias):
        standard = x / (1 + plain.eps) ** 0.5
        return standard * torch.tensor(weight)[:, None, None] + torch.tensor(bias)[:, None, None]

    torch.testing.assert_close(noisy(x), expected([0.5, 2.0, 0.0], [0.5, -1.0, 2.0]))  # the mask leaves beta alone
    noisy.perturbed = True
    torch.testing.assert_close(noisy(x), expected([0.9, 1.2, 0.3], [0.4, -1.3, 2.8]))


def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    norm = convert_noisy(nn.BatchNorm2d(3)).double().train()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)

    def function(mask, d, b):
        norm.mask, norm.weight_noise, norm.bias_noise, norm.perturbed = mask, d, b, True
        return (norm(x) ** 3).sum()

    norm.bias = nn.Parameter(torch.randn(3, dtype=torch.float64))
    inputs = tuple(torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(function, inputs)


def test_conversion_copies_unless_in_place(network):
    names = list(network.state_dict())
    converted = convert_noisy(network)
    assert not noisy_layers(network) and len(noisy_layers(converted)) == 20
    assert list(converted.state_dict()) == names
    converted.bn1.weight.data.zero_()
    assert network.bn1.weight.abs().sum() > 0
    assert convert_noisy(network, inplace=True) is network
    assert len(noisy_layers(network)) == 20


def test_torchvision_network_computes_the_same():
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v3_small(weights=None, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(convert_noisy(network)(x), network(x))


def test_shared_module_stays_shared():
    norm = nn.BatchNorm1d(4)
    network = convert_noisy(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm), "c": nn.BatchNorm1d(4)}))
    assert network["a"] is network["b"][0]
    assert list(noisy_layers(network)) == ["a", "c"]


class NormAct(nn.BatchNorm2d):
    """BatchNorm, dropout and activation in one module, such as timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels, momentum=None)
        self.drop, self.act = nn.Dropout(0.5), nn.LeakyReLU(0.1)
        self.tracked = []

    def forward(self, x):
        self.tracked.append(self.track_running_stats)
        return self.act(self.drop(super().forward(x)))


class CarelessNorm(nn.BatchNorm2d):
    """Updates its statistics without asking whether it should."""

    def forward(self, x):
        self.num_batches_tracked += 1
        statistics = self.running_mean, self.running_var
        return 2 * F.batch_norm(x, *statistics, self.weight, self.bias, self.training, 0.1, self.eps)


def filled(kind):
    """A layer of 3 channels that is not the identity, in eval mode."""
    torch.manual_seed(0)
    norm = kind(3).eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize("kind", [NormAct, CarelessNorm])
@pytest.mark.parametrize("training", [True, False])
def test_own_forward_sees_effective_parameters(kind, training):
    norm, x = filled(kind), torch.randn(6, 3, 4, 4)
    noisy = convert_noisy(norm)
    assert isinstance(noisy, NoisyBatchNorm) and isinstance(noisy, kind) and list(noisy_layers(noisy)) == [""]
    assert list(noisy.state_dict()) == list(norm.state_dict())
    assert torch.equal(noisy(x), norm(x))
    mask, noise, shift = torch.tensor([[0.5, 0.0, 1.0], [0.2, -0.3, 0.1], [-0.4, 0.2, 0.0]])
    noisy.mask, noisy.weight_noise, noisy.bias_noise = mask.clone().requires_grad_(), noise, shift
    for noisy.perturbed, scale, move in ((False, mask, 1), (True, mask + noise, 1 + shift)):
        expected = copy.deepcopy(norm)
        with torch.no_grad():
            expected.weight.mul_(scale)
            expected.bias.mul_(move)
        noisy.training = expected.training = training  # the dropout stays off
        before = copy.deepcopy(noisy.state_dict())
        for layer in (noisy, copy.deepcopy(noisy)):
            torch.testing.assert_close(layer(x), expected.forward(x))
            assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
        (gradient,) = torch.autograd.grad(noisy(x).square().sum(), noisy.mask)
        assert gradient.abs().min() > 0
    assert noisy.weight is noisy._parameters["weight"] and noisy.track_running_stats
    if kind is NormAct and training:
        assert not any(noisy.tracked[-2:]), "with momentum None, tracking reads a number from the device"


def test_own_forward_that_fails_leaves_the_layer_as_it_was():
    noisy = convert_noisy(filled(NormAct))
    weight = noisy.weight
    with pytest.raises(ValueError, match="expected 4D"):
        noisy(torch.randn(2, 3))
    assert noisy.weight is weight and isinstance(weight, nn.Parameter)


def test_own_forward_with_a_batchnorm_inside():
    norm = filled(NormAct)
    norm.inner = nn.BatchNorm2d(3)
    network = nn.Sequential(norm)
    assert list(noisy_layers(convert_noisy(network))) == ["0", "0.inner"]


def repair(network, images):
    """Convert, learn masks, prune half of the neurons; returns the noisy network and the repaired one."""
    noisy = convert_noisy(network)
    before = copy.deepcopy(noisy.state_dict())
    config = AnpConfig(iterations=2, batch_size=8)
    assert len(list(optimize_masks(noisy, images, torch.arange(len(images)) % 5, config))) == 2
    assert all(torch.equal(value, before[name]) for name, value in noisy.state_dict().items())
    neurons = mask_values(noisy)
    assert min(neuron.mask for neuron in neurons) < 1
    repaired = copy.deepcopy(network)
    prune_neurons(repaired, sort_neurons(neurons)[: len(neurons) // 2])
    return noisy, repaired


def test_own_forward_from_conversion_to_pruning():
    network = nn.Sequential(nn.Conv2d(3, 3, 3), filled(NormAct), nn.Flatten(), nn.Linear(108, 5))
    noisy, repaired = repair(network, torch.randn(10, 3, 8, 8))
    assert [neuron.layer for neuron in mask_values(noisy)] == ["1"] * 3
    assert (repaired[1].weight == 0).sum() == 1
    masked, x = apply_masks(network, noisy).eval(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(noisy(x), masked(x))


def test_own_forward_of_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("resnetv2_18", num_classes=5).eval()
    images = torch.randn(10, 3, 64, 64)
    assert torch.equal(convert_noisy(network)(images), network(images))
    noisy, repaired = repair(network, images)
    norms = [module for module in repaired.modules() if isinstance(module, timm.layers.BatchNormAct2d)]
    assert len(norms) == len(noisy_layers(noisy)) > 10
    assert sum(int((norm.weight == 0).sum()) for norm in norms) >= len(mask_values(noisy)) // 2
    torch.testing.assert_close(noisy(images), apply_masks(network, noisy)(images))


class GivenForward(nn.BatchNorm2d):
    """Forward as it is given, a function of layer and input."""

    def __init__(self, function):
        super().__init__(4)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda norm, x: x, "does not scale by its weight"),
        (lambda norm, x: x + nn.BatchNorm2d.forward(norm, x), "does not scale by its weight"),
        (lambda norm, x: x @ torch.ones(9, 9), "takes no tensor of 2 to 5 dimensions"),
    ],
)
def test_own_forward_that_cannot_be_masked(function, words):
    with pytest.raises(InputError, match=f"1: GivenForward cannot be converted: .*{words}"):
        convert_noisy(nn.Sequential(nn.Conv2d(3, 4, 1), GivenForward(function)))


def test_own_forward_with_a_mask_of_its_own():
    norm = filled(NormAct)
    norm.register_buffer("mask", torch.ones(3))
    with pytest.raises(InputError, match="something of its own named mask"):
        convert_noisy(norm)


def test_what_cannot_be_masked():
    patched = nn.BatchNorm2d(4)
    patched.forward = lambda x: x
    with pytest.raises(InputError, match="0: the forward of this BatchNorm2d was replaced"):
        convert_noisy(nn.Sequential(patched))
    without = nn.BatchNorm2d(4, affine=False)
    mixed = convert_noisy(nn.Sequential(without, nn.BatchNorm2d(4)))
    assert list(noisy_layers(mixed)) == ["1"]
    with pytest.raises(ValueError, match="no neuron to mask"):
        convert_noisy(nn.Sequential(without))
    with pytest.raises(ValueError, match="no size yet"):
        convert_noisy(nn.Sequential(nn.LazyBatchNorm2d()))


def test_hooks_stay_hooks():
    norm, seen = nn.BatchNorm2d(4), []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(type(module)) or 2 * output)
    norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    network, x = nn.Sequential(norm).eval(), torch.randn(2, 4, 3, 3)
    expected = network(x)
    assert torch.equal(convert_noisy(network)(x), expected)
    assert seen == [nn.BatchNorm2d, NoisyBatchNorm]


def test_a_converted_layer_shares_tensors_and_nothing_else():
    norm = nn.BatchNorm2d(4)
    noisy = NoisyBatchNorm(norm)
    assert noisy.weight is norm.weight and noisy.running_mean is norm.running_mean
    assert "mask" not in norm._buffers and not norm._non_persistent_buffers_set


def test_a_mask_prunes_the_same_from_python_and_from_a_file(tmp_path):
    """Rounded once: 0.20004 is 0.2000 in the file, and pruned at 0.2 in both."""
    noisy = convert_noisy(nn.Sequential(nn.BatchNorm2d(3)))
    noisy[0].mask = torch.tensor([0.20004, 0.20006, 0.19996])
    neurons = mask_values(noisy)
    write_masks(tmp_path / "masks.txt", neurons, "abc")
    read = read_masks(tmp_path / "masks.txt", noisy)
    assert [neuron.index for neuron in neurons_up_to(neurons, 0.2)] == [0, 2]
    assert read == neurons


def test_without_running_statistics():
    plain = nn.BatchNorm2d(4, track_running_stats=False).eval()
    x = torch.randn(8, 4, 3, 3)
    assert torch.equal(convert_noisy(plain)(x), plain(x))


@pytest.mark.parametrize(("channels", "size"), [(4, 32), (4, 64), (8, 64), (8, 32), (16, 64)])
def test_shortcuts_of_narrow_networks_compute_the_same(channels, size, monkeypatch):
    """oneDNN's strided 1x1 convolution would end the process here; strides by hand give the same numbers."""
    shortcut = Shortcut(channels, 2 * channels, 2).to(memory_format=torch.channels_last).train()
    images = torch.randn(22, channels, size, size).contiguous(memory_format=torch.channels_last)
    strided, original = [], nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda *given: strided.append(1) or original(*given))
    out = shortcut(images)
    weights = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * weights).sum(), shortcut[0].weight)
    assert bool(strided) == (channels == 16 or (channels, size) == (8, 32)), "others stay as they were, to the last bit"
    exact = copy.deepcopy(shortcut).double()  # oneDNN computes nothing in float64
    expected = exact[1](exact[0](images.double()))
    (plain,) = torch.autograd.grad((expected * weights).sum(), exact[0].weight)
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradient.double(), plain, atol=1e-2, rtol=1e-3)
    assert torch.equal(shortcut.eval()(images), shortcut[1](shortcut[0](images)))
