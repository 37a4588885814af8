"""Networks without BatchNorm: their neurons are channels of other layers."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune

import optimize_mask_cifar
import prune_neuron_cifar
import train_backdoor_cifar
from defenses import AnpConfig, ChoiceConfig, optimize_masks, repair
from defenses.anp import apply_masks
from engine.memory import masking_bytes, meta_copy
from examples.plain_cnn import plain_cnn
from formats.checkpoints import read_state_dict
from formats.mask_file import read_masks, write_masks
from models import NoisyLayer, convert_noisy, mask_values, noisy_layers, prune_neurons
from models.neuron_layers import neuron_layers
from models.neurons import Neuron
from utils.errors import InputError

CONFIG = AnpConfig(iterations=3, batch_size=8, lr=5.0)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3))


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm over the last dimension, two linear layers, a residual."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.wide, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x):
        out = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + self.narrow(nn.functional.gelu(self.wide(out))).permute(0, 3, 1, 2)


def small_convnext():
    stages = [
        torchvision.models.convnext.CNBlockConfig(8, 12, 1),
        torchvision.models.convnext.CNBlockConfig(12, None, 1),
    ]
    return torchvision.models.ConvNeXt(stages, num_classes=3, stochastic_depth_prob=0.5)


def small_vit():
    return torchvision.models.VisionTransformer(16, 8, 2, 2, 12, 16, dropout=0.5, num_classes=3)


def small_encoder():
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(60, 3))


class Attention(nn.Module):
    """Attention that uses the weights of its last layer without calling it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(self.attention(x, x, x, need_weights=False)[0].mean(1))


NETWORKS = {
    "convolutions": (plain_cnn, (3, 16, 16), ["0", "3", "6", "8", "11", "13"]),
    "linear": (mlp, (6,), ["0", "2"]),
    "only convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        (3, 8, 8),
        ["0"],
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(2, 4, 3), nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(20, 3)),
        (2, 5),
        ["1"],
    ),
    "statistics alone": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3)),
        (6,),
        ["0"],
    ),
    "GroupNorm": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.Flatten(), nn.Linear(216, 3)),
        (3, 8, 8),
        ["1"],
    ),
    "InstanceNorm": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
            nn.Flatten(),
            nn.Linear(216, 3),
        ),
        (3, 8, 8),
        ["1"],
    ),
    "RMSNorm": (lambda: nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 3)), (6,), ["1"]),
    "ConvNeXt block": (
        lambda: nn.Sequential(nn.Conv2d(3, 5, 2, 2), ConvNeXtBlock(5), nn.Flatten(), nn.Linear(80, 3)),
        (3, 8, 8),
        ["1.norm"],
    ),
    "ConvNeXt": (
        small_convnext,
        (3, 32, 32),
        ["features.0.1", "features.1.0.block.2", "features.2.0", "features.3.0.block.2", "classifier.0"],
    ),
    "ViT": (
        small_vit,
        (3, 16, 16),
        [*(f"encoder.layers.encoder_layer_{n}.ln_{m}" for n in (0, 1) for m in (1, 2)), "encoder.ln"],
    ),
    "encoder": (small_encoder, (5, 12), [f"0.layers.{n}.norm{m}" for n in (0, 1) for m in (1, 2)]),
    "attention": (Attention, (5, 6), ["attention.out_proj"]),
    "MLP with BatchNorm": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3)),
        (6,),
        ["1"],
    ),
}


def random_network(name):
    """A network of which no parameter is 0 or 1, in eval mode, and images for it."""
    torch.manual_seed(0)
    build, shape, _ = NETWORKS[name]
    network = build().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network, torch.randn(10, *shape)


def by_hand(network, noisy):
    """Multiply the weights of the unconverted network as the masks and the noise of the converted one say."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        for name, layer in noisy_layers(noisy).items():
            plain = network.get_submodule(name)
            for index in range(len(plain.weight)):
                scale = layer.mask[index] + (layer.weight_noise[index] if layer.perturbed else 0)
                plain.weight[index] *= scale
                if layer.perturbed and getattr(plain, "bias", None) is not None:
                    plain.bias[index] *= 1 + layer.bias_noise[index]
    return network


def disturb(noisy):
    for layer in noisy_layers(noisy).values():
        count = len(layer.mask)
        layer.mask, layer.weight_noise, layer.bias_noise = torch.rand(count), torch.randn(count), torch.randn(count)


@pytest.mark.parametrize("name", NETWORKS)
def test_which_layers_have_neurons(name):
    network, images = random_network(name)
    noisy = convert_noisy(network)
    assert list(neuron_layers(network)) == list(neuron_layers(noisy)) == list(noisy_layers(noisy)) == NETWORKS[name][2]
    assert list(noisy.state_dict()) == list(network.state_dict()) and not noisy_layers(network)
    assert torch.equal(noisy(images), network(images))
    for layer, plain in zip(noisy_layers(noisy).values(), neuron_layers(network).values(), strict=True):
        assert isinstance(layer, NoisyLayer) and len(layer.mask) == len(plain.weight)


@pytest.mark.parametrize("perturbed", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_masks_and_noise_act_as_on_the_weights_themselves(name, perturbed):
    network, images = random_network(name)
    noisy = convert_noisy(network)
    disturb(noisy)
    for layer in noisy_layers(noisy).values():
        layer.perturbed = perturbed
    expected = by_hand(network, noisy)(images)
    torch.testing.assert_close(noisy(images), expected)
    with torch.inference_mode():
        torch.testing.assert_close(noisy(images), expected, rtol=1e-4, atol=1e-5)  # attention has a fast path
    assert not torch.allclose(expected, network(images), rtol=0.01)
    if not perturbed:
        torch.testing.assert_close(apply_masks(network, noisy)(images), expected)


LAYERS = {
    "Conv1d": (nn.Conv1d(2, 3, 2), (2, 5)),
    "Conv2d": (nn.Conv2d(4, 6, 2, stride=2, groups=2, padding=1, padding_mode="circular", bias=False), (4, 5, 5)),
    "Conv3d": (nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "Linear": (nn.Linear(4, 3), (2, 4)),
    "LayerNorm": (nn.LayerNorm(4), (2, 4)),
    "LayerNorm of several dimensions": (nn.LayerNorm((3, 2, 2)), (3, 2, 2)),
    "LayerNorm without bias": (nn.LayerNorm(4, bias=False), (2, 4)),
    "GroupNorm": (nn.GroupNorm(2, 4), (4, 3)),
    "InstanceNorm2d": (nn.InstanceNorm2d(3, affine=True), (3, 2, 2)),
    "RMSNorm": (nn.RMSNorm(4, eps=1e-5), (2, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_every_kind_against_finite_differences(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    network = nn.Sequential(copy.deepcopy(layer), nn.Flatten(), nn.LazyLinear(2)).double().eval()
    x = torch.randn(3, *shape, dtype=torch.float64)
    network(x)
    noisy = convert_noisy(network).requires_grad_(False)
    (changed,) = noisy_layers(noisy).values()

    def function(mask, d, b):
        changed.mask, changed.weight_noise, changed.bias_noise, changed.perturbed = mask, d, b, True
        return noisy(x).pow(3).sum() + 0 * b.sum()  # b has no effect where there is no bias

    inputs = tuple(torch.rand(len(changed.mask), dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", NETWORKS)
def test_pruning_is_a_mask_of_zero(name, tmp_path):
    network, images = random_network(name)
    noisy = convert_noisy(network)
    pruned = [(layer, index) for layer in NETWORKS[name][2] for index in (0, 2)]
    for layer, index in pruned:
        noisy.get_submodule(layer).mask[index] = 0
    write_masks(tmp_path / "masks.txt", mask_values(noisy), "abc")
    neurons = [neuron for neuron in read_masks(tmp_path / "masks.txt", network) if neuron.mask == 0]
    assert [(neuron.layer, neuron.index) for neuron in neurons] == pruned
    before = copy.deepcopy(network.state_dict())
    prune_neurons(network, neurons)
    torch.testing.assert_close(network(images), noisy(images))
    for key, tensor in network.state_dict().items():
        layer, _, kind = key.rpartition(".")
        if kind == "weight" and layer in NETWORKS[name][2]:
            assert not tensor[[0, 2]].any()
            before[key][[0, 2]] = 0
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", NETWORKS)
def test_repair_from_masks_to_pruning(name):
    network, images = random_network(name)
    before = copy.deepcopy(network.state_dict())
    repaired = repair(network, images, torch.arange(10) % 3, CONFIG, ChoiceConfig(threshold=0.9))
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    assert {neuron.layer for neuron in repaired.neurons} == set(NETWORKS[name][2])
    count = repaired.choice.point.count
    assert 0 < count == sum(neuron.mask <= 0.9 for neuron in repaired.neurons)
    weights = [repaired.network.get_submodule(layer).weight for layer in NETWORKS[name][2]]
    assert sum(int((weight.reshape(len(weight), -1) == 0).all(1).sum()) for weight in weights) == count


def test_torchvision_networks_of_batchnorms_have_the_same_neurons_as_ever():
    network = torchvision.models.resnet18(num_classes=3)
    norms = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert list(noisy_layers(convert_noisy(network))) == norms and len(norms) == 20
    repaired = repair(network, torch.randn(6, 3, 32, 32), torch.arange(6) % 3, CONFIG)
    assert len(repaired.neurons) == 4800


@pytest.mark.parametrize("name", ["InstanceNorm", "statistics alone", "ViT", "ConvNeXt"])
def test_only_masks_change_and_everything_stays_in_eval_mode(name):
    network, images = random_network(name)
    noisy, modes = convert_noisy(network), []
    for module in noisy.modules():
        module.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    before = copy.deepcopy(noisy.state_dict())
    for _ in optimize_masks(noisy, images, torch.arange(10) % 3, CONFIG):
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in noisy.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in noisy.state_dict().items())
    assert len(modes) > 20 and not any(modes)


def test_autocast_computes_as_with_the_weights_themselves():
    network, images = random_network("convolutions")
    noisy = convert_noisy(network)
    disturb(noisy)
    with torch.autocast("cpu", torch.bfloat16):
        out = noisy(images)
        assert out.dtype == torch.bfloat16 and torch.equal(out, by_hand(network, noisy)(images))


def test_networks_of_other_precision():
    network, images = random_network("convolutions")
    repaired = repair(network.bfloat16(), images.bfloat16(), torch.arange(10) % 3, CONFIG)
    assert next(repaired.network.parameters()).dtype == torch.bfloat16 and repaired.neurons[0].mask < 1


def test_a_layer_that_is_used_twice_is_masked_twice():
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    network, x = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(6, 3)), torch.randn(4, 6)
    noisy = convert_noisy(network)
    assert list(noisy_layers(noisy)) == ["0"] and noisy[0] is noisy[2]
    disturb(noisy)
    torch.testing.assert_close(noisy(x), by_hand(network, noisy)(x))


def test_hooks_stay_hooks():
    network, x = mlp(), torch.randn(2, 6)
    network[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert torch.equal(convert_noisy(network)(x), network(x))


def test_the_memory_of_step_2_is_counted():
    for build in (plain_cnn, small_convnext):
        network = meta_copy(build())
        small, large = (masking_bytes(network, size, torch.float32) for size in (64, 1024))
        assert large > small + 10_000_000


class OwnNorm(nn.LayerNorm):
    """Forward as it is given, a function of layer and input."""

    def __init__(self, function):
        super().__init__(4)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


class StandardizedConv(nn.Conv2d):
    """Divides the weights of each channel by their deviation, so that no mask changes anything."""

    def forward(self, x):
        weight = self.weight / self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class CallsAnother(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x


def tied():
    network = mlp()
    network[2] = nn.Linear(6, 8)
    network[2].weight = network[0].weight
    return network


def replaced():
    network = mlp()
    network[0].forward = lambda x: x
    return network


def with_mask_of_its_own():
    network = mlp()
    network[0].mask = torch.ones(8)
    return network


def put_first(layer):
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: put_first(parametrizations.weight_norm(nn.Linear(4, 4))), "0: this .*Linear computes its weight"),
        (lambda: put_first(nn.utils.spectral_norm(nn.Conv2d(3, 4, 1))), "0: this Conv2d computes its weight"),
        (lambda: put_first(prune.l1_unstructured(nn.Linear(4, 4), "weight", 1)), "0: this Linear computes its weight"),
        (lambda: put_first(parametrizations.weight_norm(nn.LayerNorm(4), dim=None)), "0: this .*LayerNorm computes"),
        (lambda: put_first(parametrizations.weight_norm(nn.BatchNorm1d(4), dim=None)), "it computes its weight"),
        (tied, "0: this Linear shares its weight"),
        (replaced, "0: the forward of this Linear was replaced"),
        (with_mask_of_its_own, "0: Linear cannot be converted: it has something of its own named mask"),
        (lambda: put_first(StandardizedConv(3, 4, 1)), "0: this StandardizedConv has a forward of its own"),
        (lambda: put_first(CallsAnother(4, 4)), "0: this CallsAnother has a forward of its own"),
        (
            lambda: put_first(OwnNorm(lambda norm, x: x)),
            "0: OwnNorm cannot be converted: .*does not scale by its weight",
        ),
        (lambda: put_first(nn.LazyConv2d(4, 1)), "0: LazyConv2d has no size yet"),
        (lambda: nn.Linear(6, 3), "no neuron to mask"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.LayerNorm(3, elementwise_affine=False)), "no neuron"),
        (nn.Flatten, "no neuron to mask"),
    ],
)
def test_what_cannot_be_masked(build, words):
    network = build()
    with pytest.raises(InputError, match=words):
        repair(network, torch.randn(6, 6), torch.arange(6) % 3, CONFIG)


def test_own_forward_of_a_norm_is_kept():
    network = nn.Sequential(OwnNorm(lambda norm, x: 2 * nn.LayerNorm.forward(norm, x).relu()), nn.Linear(4, 3))
    noisy, x = convert_noisy(network), torch.randn(5, 4)
    assert isinstance(noisy[0], OwnNorm)
    disturb(noisy)
    torch.testing.assert_close(noisy(x), by_hand(network, noisy)(x))


def test_a_neuron_of_the_logits_is_none():
    with pytest.raises(ValueError, match="no layer '4' with neurons"):
        prune_neurons(mlp(), [Neuron("4", 0, 0.0)])


def test_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    for name in ("convnext_atto", "vit_tiny_patch16_224", "resnetv2_50x1_bit"):
        network = timm.create_model(name, num_classes=3).eval()
        noisy, images = convert_noisy(network), torch.randn(2, 3, 224, 224)
        disturb(noisy)
        torch.testing.assert_close(noisy(images), by_hand(network, noisy)(images), rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="forward of its own"):
        convert_noisy(timm.create_model("nf_resnet26"))


MODEL = ["--model", "examples/plain_cnn.py:plain_cnn", "--precision", "fp32"]


def test_three_steps(tmp_path, capsys):
    common = ["--output-dir", str(tmp_path), *MODEL]
    assert train_backdoor_cifar.main([*common, "--dataset", "tiny", "--epoch", "1", "--lr", "0.01"]) == 0
    source = ["--checkpoint", str(tmp_path / "last_model.th"), "--trigger-info", str(tmp_path / "trigger_info.th")]
    source += ["--val-frac", "0.1"]
    options = ["--nb-iter", "2", "--batch-size", "32"]
    assert optimize_mask_cifar.main([*common, *source, *options]) == 0
    assert len(read_masks(tmp_path / "mask_values.txt", plain_cnn())) == 432
    masks = ["--mask-file", str(tmp_path / "mask_values.txt"), "--number", "40"]
    assert prune_neuron_cifar.main([*common, *source, *masks]) == 0
    repaired = read_state_dict(tmp_path / "repaired_model.th")
    zeros = [int((tensor.flatten(1) == 0).all(1).sum()) for name, tensor in repaired.items() if tensor.dim() == 4]
    assert len(zeros) == 6 and sum(zeros) == 40
    assert "40 of 432 neurons" in capsys.readouterr().out


def test_step_2_without_a_neuron_says_so_in_one_line(tmp_path, capsys):
    code = tmp_path / "net.py"
    code.write_text(
        "from torch import nn\n"
        "def linear(num_classes):\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, num_classes))\n"
    )
    common = ["--output-dir", str(tmp_path / "out"), "--model", f"{code}:linear", "--precision", "fp32"]
    assert train_backdoor_cifar.main([*common, "--dataset", "tiny", "--epoch", "1", "--lr", "0.01"]) == 0
    capsys.readouterr()
    source = ["--checkpoint", str(tmp_path / "out" / "last_model.th"), "--val-frac", "0.1"]
    assert optimize_mask_cifar.main([*common, *source, "--nb-iter", "1"]) == 1
    error = capsys.readouterr().err
    assert "there is no neuron to mask" in error and error.strip().count("\n") == 0
    assert not (tmp_path / "out" / "mask_values.txt").exists()
