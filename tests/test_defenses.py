"""The defences beside ANP: each against a small case with a known answer, and all of them alike."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from defenses import (
    DEFENSES,
    AttentionDistillation,
    ChannelLipschitz,
    FinePruning,
    FineTuning,
    ModeConnectivity,
    NoisyTuning,
    SharpnessAware,
)
from defenses.attention_distillation import attention, stages
from defenses.channel_lipschitz import followed_by_batchnorm, lipschitz_bounds
from defenses.defense import CleanImages
from defenses.fine_pruning import last_activations
from defenses.mode_connectivity import bezier
from defenses.tuning import pruned_rows
from engine.cuda_graph import record
from engine.training import make_recordable
from models import build_model, convert_noisy, noisy_layers
from models.neurons import Neuron, prune_neurons
from tests.replay import Replay
from utils.errors import InputError

SHORT = {"iterations": 4, "batch_size": 16}
SETTINGS = {
    "mcr": {**SHORT, "end_iterations": 3},
    "nad": {**SHORT, "teacher_iterations": 3},
    "clp": {"u": 1.0},
}
TUNING = [name for name in DEFENSES if name != "clp"]


def defense(name, **changes):
    return DEFENSES[name](**{**SETTINGS.get(name, SHORT), **changes})


@pytest.fixture
def clean():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 3, 32, 32, generator=generator)
    return CleanImages(images, torch.randint(10, (40,), generator=generator))


def bits(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# ---- all of them


@pytest.mark.parametrize("name", DEFENSES)
def test_a_copy_is_repaired_the_same_way_every_time(name, network, clean):
    before = bits(network)
    first, again = (defense(name).repair(network, clean.images, clean.labels) for _ in range(2))
    assert same(before, bits(network)), "the network that came in stays as it was"
    assert same(bits(first), bits(again)) and not same(bits(first), before)
    assert not first.training and bits(first).keys() == before.keys()
    if name in TUNING:
        assert not same(bits(first), bits(defense(name, seed=1).repair(network, clean.images, clean.labels)))


@pytest.mark.parametrize("name", DEFENSES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whatever_gradient_mode_the_caller_is_in(name, network, clean, mode):
    expected = bits(defense(name).repair(network, clean.images, clean.labels))
    with mode():
        assert same(expected, bits(defense(name).repair(network, clean.images, clean.labels)))


def state_bits(loop):
    return [part.clone() for part in tree_leaves(loop.state_dict()) if torch.is_tensor(part)]


@pytest.mark.parametrize("name", DEFENSES)
@pytest.mark.parametrize("stop", [1, 5])
def test_it_resumes_exactly(name, network, clean, stop):
    through, broken, resumed = (defense(name).make_loop(network, clean) for _ in range(3))
    list(through.steps())
    list(itertools.islice(broken.steps(), stop))
    resumed.load_state_dict(copy.deepcopy(broken.state_dict()))
    assert resumed.done == broken.done == min(stop, resumed.total)
    list(resumed.steps())
    assert resumed.done == through.done == through.total
    assert all(map(torch.equal, state_bits(resumed), state_bits(through)))
    assert same(bits(resumed.current()), bits(through.current()))


@pytest.mark.parametrize("name", DEFENSES)
def test_pruned_neurons_stay_pruned(name, network, clean):
    prune_neurons(network, [Neuron("layer4.1.bn2", 3, 0.0), Neuron("layer2.0.bn1", 5, 0.0)])
    repaired = defense(name).repair(network, clean.images, clean.labels)
    assert repaired.layer4[1].bn2.weight[3] == 0 and repaired.layer2[0].bn1.weight[5] == 0


@pytest.mark.parametrize("name", TUNING)
def test_a_shift_that_was_pruned_stays_pruned_and_another_is_trained(name, network, clean):
    pruned, constant = network.layer4[1].bn2, network.layer2[0].bn1
    with torch.no_grad():
        pruned.weight[3] = pruned.bias[3] = constant.weight[5] = 0  # as FP and CLP prune, and as ANP does
    repaired = defense(name, weight_decay=0.0).repair(network, clean.images, clean.labels)
    after = repaired.layer4[1].bn2
    assert after.weight[3] == after.bias[3] == 0 and (after.bias != pruned.bias).sum() == 31
    assert repaired.layer2[0].bn1.bias[5] != constant.bias[5]


@pytest.mark.parametrize("name", TUNING)
def test_bfloat16_computes_nearly_the_same(name, network, clean):
    weights = [
        defense(name, precision=precision).repair(network, clean.images, clean.labels).linear.weight
        for precision in (torch.float32, torch.bfloat16)
    ]
    assert weights[0].dtype == weights[1].dtype == torch.float32
    moved = [(weight - network.linear.weight).flatten() for weight in weights]
    assert not torch.equal(*moved) and F.cosine_similarity(*moved, dim=0) > 0.9


@pytest.mark.parametrize("name", TUNING)
def test_a_recorded_update_is_the_update(name, network, clean, monkeypatch, capsys):
    """As on CUDA, where the kernels of an update are recorded and repeated."""
    recordings = []

    def recorded(iterate, changed, batch):
        recordings.append(record(iterate, changed, batch, Replay()))
        assert recordings[-1] is not iterate
        return recordings[-1]

    loops = [defense(name).make_loop(network, clean) for _ in range(2)]
    for loop in loops:
        for each in (loop, getattr(loop, "end_loop", loop), getattr(loop, "teacher_loop", loop)):
            make_recordable(each.optimizer)
    list(loops[0].steps())
    monkeypatch.setattr("defenses.tuning.replayed", recorded)
    list(loops[1].steps())
    assert len(recordings) == (2 if name in ("mcr", "nad") else 1) and capsys.readouterr().out == ""
    assert all(map(torch.equal, state_bits(loops[0]), state_bits(loops[1])))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4).long(), "images are torch.uint8"),
        (torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int32), "labels are torch.int32"),
        (torch.zeros(4, 3, 32, 32), torch.full((4,), -100), "0 or more"),
        (torch.zeros(4, 3, 32, 32), torch.zeros(5).long(), "4 images and 5 labels"),
        (torch.full((4, 3, 32, 32), torch.nan), torch.zeros(4).long(), "NaN"),
    ],
)
def test_images_that_mean_nothing(images, labels, message):
    with pytest.raises(InputError, match=message):
        CleanImages(images, labels)


@pytest.mark.parametrize("name", TUNING)
def test_labels_beyond_the_networks_outputs(name, network, clean):
    labels = clean.labels.clone()
    labels[7] = 10
    with pytest.raises(InputError, match="labels go up to 10, but the network's classes are 0 to 9"):
        defense(name).repair(network, clean.images, labels)
    with pytest.raises(InputError, match="labels go up to 10"):
        replace(clean, labels=labels).accuracy(network)


def test_the_transform_sees_every_batch(network, clean):
    seen = []

    def transform(batch, generator):
        seen.append(len(batch))
        return batch

    FineTuning(**SHORT).repair(network, clean.images, clean.labels, transform)
    assert seen == [16] * 4


def test_images_in_batches_of_one_size(monkeypatch):
    monkeypatch.setattr("defenses.defense.BATCH", 4)
    clean = CleanImages(torch.zeros(9, 1), torch.arange(9))
    assert [len(labels) for _, labels in clean.batches()] == [3, 3, 3]
    assert torch.cat([labels for _, labels in clean.batches()]).tolist() == list(range(9))


# ---- FT


def test_fine_tuning_lowers_the_loss_and_its_rate_drops(network, clean):
    loop = FineTuning(iterations=60, batch_size=32, lr=0.02).make_loop(network, clean, row_every=20)
    rows = [loop.row() for _ in loop.steps() if loop.due()]
    assert [row["iteration"] for row in rows] == [20, 40, 60] and [row["lr"] for row in rows] == [0.02, 0.02, 0.002]
    assert rows[0]["loss"] > rows[1]["loss"] > rows[2]["loss"] and rows[2]["batch acc %"] > 60


def test_one_update_is_that_of_plain_sgd(network, clean):
    loop = FineTuning(iterations=1, batch_size=16, lr=0.1, weight_decay=0.01).make_loop(network, clean)
    plain = copy.deepcopy(network).train()
    images, labels = loop.draw(torch.Generator().manual_seed(3))
    F.cross_entropy(plain(images), labels).backward()
    torch.optim.SGD(plain.parameters(), 0.1, weight_decay=0.01).step()
    loop._pruned = []
    loop.network.train()
    loop.optimizer.param_groups[0]["lr"] = 0.1
    loop.update((images, labels))
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(loop.network.state_dict()[name], tensor, msg=name)


def test_which_weights_are_pruned():
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 2))
    network[0].weight.data[1] = 0
    network[1].weight.data[1:] = 0
    network[1].bias.data[1] = 0.5
    network[2].weight.data[0, 0] = 0  # a part of a neuron
    found = [(name, kept.flatten().tolist()) for name, kept in named_rows(network)]
    assert found == [("0.weight", [1, 0, 1]), ("1.weight", [1, 0, 0]), ("1.bias", [1, 1, 0])]


def named_rows(network):
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [(names[id(parameter)], kept) for parameter, kept in pruned_rows(network)]


# ---- FP


class Bars(nn.Module):
    """Channel i of its last convolution shows whether the image is of class i; channels 3 and 4 are never active."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 3, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.cat([torch.eye(3), -torch.ones(2, 3)])[:, :, None, None])
            self.norm.weight.copy_(torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0]))
            self.head.weight.copy_(torch.eye(3, 5))

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def bars():
    labels = torch.arange(30) % 3
    return Bars(), CleanImages(F.one_hot(labels, 3).float()[:, :, None, None].expand(-1, -1, 4, 4).clone(), labels)


def test_activations_of_the_last_convolution(bars, network, clean):
    layer, activations = last_activations(*bars, torch.float32)
    expected = torch.tensor([1.0, 2 / 3, 1 / 3, 0, 0], dtype=torch.float64)
    assert layer == "norm" and torch.allclose(activations, expected, atol=1e-4)
    layer, activations = last_activations(network, clean, torch.float32)
    assert layer == "layer4.1.bn2" and activations.shape == (32,)


def test_the_last_batchnorm_of_a_preactresnet_makes_the_input_of_the_last_convolution(clean):
    preact, seen = build_model("preactresnet18", 10, 1 / 16), []
    preact.layer4[1].conv2.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    layer, activations = last_activations(preact, clean, torch.float32)
    assert layer == "layer4.1.bn2" and torch.allclose(activations, seen[0].double().mean((0, 2, 3)))


class ChannelsLast(nn.Module):
    """Its LayerNorm works on (B, H, W, C)."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 5, 1), nn.LayerNorm(5), nn.Linear(5, 10)
        nn.init.uniform_(self.norm.weight)

    def forward(self, x):
        return self.head(self.norm(self.conv(x).permute(0, 2, 3, 1)).relu().mean((1, 2)))


class TurnedNorm(nn.LayerNorm):
    """A LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(6, 7), (5, 5)])
def test_channels_of_a_layernorm(size):
    images = torch.randn(8, 3, *size, generator=torch.Generator().manual_seed(0))
    clean, network = CleanImages(images, torch.arange(8)), ChannelsLast()
    with torch.no_grad():
        features = network.norm(network.conv(images).permute(0, 2, 3, 1))  # (B, H, W, C)
        expected = features.relu().double().mean((0, 1, 2))
    layer, activations = last_activations(network, clean, torch.float32)
    assert layer == "norm" and torch.allclose(activations, expected)
    turned = TurnedNorm(5)
    turned.load_state_dict(network.norm.state_dict())
    same_features = nn.Sequential(network.conv, turned, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), network.head)
    layer, activations = last_activations(same_features, clean, torch.float32)
    assert layer == "1" and torch.allclose(activations, expected)
    assert stages(same_features, images) == ["2"]
    with pytest.raises(InputError, match=r"NAD needs feature maps \(B, C, H, W\); norm returns \(B, H, W, C\)"):
        stages(network, images)


@pytest.mark.parametrize(("tolerance", "pruned"), [(0.0, 2), (33.0, 2), (34.0, 3), (66.0, 3), (67.0, 5)])
def test_pruning_ends_with_the_last_good_network(bars, tolerance, pruned):
    """Channels 3 and 4 cost nothing, 2 and then 1 a third each, 0 nothing more: ties go to class 0."""
    network, clean = bars
    loop = FinePruning(iterations=1, batch_size=8, tolerance=tolerance).make_loop(network, clean)
    before = loop.unpruned
    list(itertools.islice(loop.steps(), 5))
    zeros = (loop.network.norm.weight == 0).nonzero().flatten().tolist()
    assert loop.done == 5 and loop.pruned == len(zeros) == pruned == loop.found()["pruned_neurons"]
    assert before - clean.accuracy(loop.network) <= tolerance / 100 + 1e-9
    if len(zeros) < 5:  # one more would have been too much, and was put back whole
        least = loop.order[len(zeros)]
        worse = copy.deepcopy(loop.network)
        assert worse.norm.weight[least] == network.norm.weight[least] != 0
        worse.norm.weight.data[least] = worse.norm.bias.data[least] = 0
        assert before - clean.accuracy(worse) > tolerance / 100


def test_rows_of_fine_pruning(bars):
    loop = FinePruning(iterations=2, batch_size=8).make_loop(*bars, row_every=1)
    rows = [loop.row()] + [loop.row() for _ in loop.steps() if loop.due()]
    assert [(row["pruned"], row["iteration"]) for row in rows] == [(0, 0), (2, 0), (2, 1), (2, 2)]


def test_a_network_without_feature_maps(clean):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 10))
    for name, message in {"fp": "feature maps", "nad": "feature maps", "clp": "followed by a BatchNorm"}.items():
        with pytest.raises(InputError, match=message):
            defense(name).repair(flat, clean.images, clean.labels)
    for name in ("ft", "mcr", "ft-sam", "ban"):
        defense(name).repair(flat, clean.images, clean.labels)


# ---- MCR


def test_the_curve_runs_from_one_network_to_the_other(network, clean):
    loop = defense("mcr").make_loop(network, clean)
    list(itertools.islice(loop.steps(), 3))  # the fine-tuning
    tuned = FineTuning(**{**SHORT, "iterations": 3}).repair(network, clean.images, clean.labels)
    assert same(bits(loop.end), bits(tuned))
    for middle, start, end in zip(loop.network.parameters(), network.parameters(), tuned.parameters(), strict=True):
        assert torch.equal(middle, (start + end) / 2), "the middle begins halfway"
    list(loop.steps())
    for t, end in ((0.0, network), (1.0, tuned)):
        assert all(map(torch.equal, loop.network_at(t).parameters(), end.parameters()))
    halfway = zip(network.parameters(), loop.network.parameters(), tuned.parameters(), strict=True)
    for found, (start, middle, end) in zip(loop.network_at(0.5).parameters(), halfway, strict=True):
        torch.testing.assert_close(found, start / 4 + middle / 2 + end / 4)
    assert sum(bezier(0.3)) == pytest.approx(1) and list(loop.candidates()) == [number / 10 for number in range(11)]
    assert same(bits(loop.candidates()[0.3]()), bits(loop.current()))


def test_statistics_are_measured_anew_for_every_t(network, clean, monkeypatch):
    monkeypatch.setattr("defenses.defense.BATCH", 20)
    loop = defense("mcr").make_loop(network, clean)
    list(loop.steps())
    for t in (0.0, 0.6):
        found = loop.network_at(t)
        seen = []
        hook = found.bn1.register_forward_pre_hook(lambda norm, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            found(clean.images)
        hook.remove()
        halves = seen[0].split(20)
        mean = torch.stack([part.mean((0, 2, 3)) for part in halves]).mean(0)
        variance = torch.stack([part.var((0, 2, 3)) for part in halves]).mean(0)
        torch.testing.assert_close(found.bn1.running_mean, mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.bn1.running_var, variance, atol=1e-5, rtol=1e-4)
        assert found.bn1.momentum == network.bn1.momentum and not found.training


def test_only_the_middle_moves_by_its_share_of_the_gradient(network, clean):
    config = ModeConnectivity(**{**SETTINGS["mcr"], "momentum": 0.0, "weight_decay": 0.01})
    loop = config.make_loop(network, clean)
    list(itertools.islice(loop.steps(), 3))
    images, labels, t = clean.images[:16], clean.labels[:16], torch.tensor(0.4)
    a, b, c = bezier(0.4)
    start, middle, end = (list(net.parameters()) for net in (network, loop.network, loop.end))
    wanted = [part.detach().clone().requires_grad_() for part in middle]
    names = [name for name, _ in network.named_parameters()]
    point = [a * s.detach() + b * m + c * e.detach() for s, m, e in zip(start, wanted, end, strict=True)]
    logits = torch.func.functional_call(copy.deepcopy(network).train(), dict(zip(names, point, strict=True)), images)
    loss = F.cross_entropy(logits, labels) + 0.005 * sum(part.square().sum() for part in point)
    gradients = torch.autograd.grad(loss, wanted)
    before = [part.detach().clone() for part in middle]
    loop._pruned = []
    loop.update((images, labels, t))
    for old, new, gradient in zip(before, middle, gradients, strict=True):
        torch.testing.assert_close(old - 0.01 * gradient, new.detach(), atol=1e-6, rtol=1e-4)


def test_the_rate_of_the_curve():
    config = ModeConnectivity(iterations=100, lr=0.02)
    assert [config.learning_rate(done) for done in (0, 50)] == [0.02, 0.02]
    assert config.learning_rate(70) == pytest.approx(0.02 * 0.505)
    assert config.learning_rate(90) == pytest.approx(config.learning_rate(99)) == pytest.approx(0.0002)


# ---- NAD


def test_attention_maps_have_unit_norm():
    features = torch.randn(4, 8, 5, 5)
    maps = attention(features)
    assert maps.shape == (4, 25) and torch.allclose(maps.norm(dim=1), torch.ones(4))
    expected = features.square().sum(1).flatten(1)
    assert torch.allclose(maps, expected / expected.norm(dim=1, keepdim=True))
    assert torch.isfinite(attention(torch.zeros(1, 2, 3, 3))).all()


def test_stages_end_with_the_last_feature_maps_of_a_size(network, clean):
    assert stages(network.eval(), clean.images[:2]) == ["layer2", "layer3", "layer4"]
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    assert stages(pooled, clean.images[:2]) == ["1"]
    repaired = AttentionDistillation(**SETTINGS["nad"]).repair(pooled, clean.images, clean.labels)
    assert not torch.equal(repaired[0].weight, pooled[0].weight)


def test_a_module_that_runs_twice_ends_no_stage(clean):
    relu = nn.ReLU()
    pooling = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
    shared = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3, stride=2), relu, *pooling)
    assert stages(shared, clean.images[:2]) == ["0", "2"]
    loop = defense("nad").make_loop(shared, clean)
    loss, logits = loop.loss(clean.images, clean.labels)  # student and teacher are one network still
    assert loss == F.cross_entropy(logits, clean.labels)


def test_maps_alike_cost_nothing_and_others_do(network, clean):
    loop = defense("nad", beta=(1.0, 10.0, 100.0)).make_loop(network, clean)
    for each in (loop.network, loop.teacher_loop.network):
        each.eval()
    loss, logits = loop.loss(clean.images, clean.labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, clean.labels))
    with torch.no_grad():
        loop.teacher_loop.network.layer4[1].bn2.weight[0] *= -20
    other, _ = loop.loss(clean.images, clean.labels)
    grabbed = []
    for each in (loop.network, loop.teacher_loop.network):
        hook = each.layer4.register_forward_hook(lambda module, inputs, output: grabbed.append(attention(output)))
        each(clean.images)
        hook.remove()
    torch.testing.assert_close(other - loss, 100 * (grabbed[0] - grabbed[1]).square().mean())
    assert other > loss


# ---- CLP


def test_a_planted_channel_is_pruned_and_no_other(network, clean):
    with torch.no_grad():
        network.layer3[0].bn2.weight[7] = 100.0
    loop = ChannelLipschitz(u=3.0).make_loop(network, clean)
    list(loop.steps())
    pruned = {
        (name, index)
        for name, norm in loop.network.named_modules()
        if isinstance(norm, nn.BatchNorm2d)
        for index in ((norm.weight == 0) & (norm.bias == 0)).nonzero().flatten().tolist()
    }
    assert ("layer3.0.bn2", 7) in pruned and loop.found() == {"pruned_neurons": len(pruned)} and len(pruned) < 10
    assert loop.total == 20 and loop.due()


def test_the_bound_is_the_largest_singular_value_times_the_scale():
    convolution, norm = nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2, eps=0.5)
    norm.weight.data[:] = torch.tensor([-3.0, 1.0])
    norm.running_var[:] = torch.tensor([3.5, 0.5])
    values = [torch.linalg.svdvals(convolution.weight[channel].reshape(3, 9))[0] for channel in range(2)]
    expected = torch.stack([values[0] * 3 / math.sqrt(4), values[1] / math.sqrt(1)])
    torch.testing.assert_close(lipschitz_bounds(convolution, norm), expected.detach())


def test_pairs_are_what_follows_at_once(network, clean):
    pairs = dict(followed_by_batchnorm(network.eval(), clean.images[:2]))
    assert len(pairs) == 20 and pairs["conv1"] == "bn1" and pairs["layer2.0.shortcut.0"] == "layer2.0.shortcut.1"
    apart = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    with pytest.raises(InputError, match="followed by a BatchNorm"):
        followed_by_batchnorm(apart.eval(), clean.images[:2])


def test_hooks_are_gone_afterwards_where_the_network_fails_too(network, clean):
    looks = [
        lambda images: last_activations(network, CleanImages(images, torch.arange(len(images))), torch.float32),
        lambda images: stages(network, images),
        lambda images: followed_by_batchnorm(network, images),
    ]
    for look in looks:
        look(clean.images[:2])
        with pytest.raises(RuntimeError, match="channels"):
            look(clean.images[:2, :2])
        assert not any(each._forward_hooks or each._forward_pre_hooks for each in network.modules())


# ---- FT-SAM


def test_the_gradient_is_taken_at_the_perturbed_weights(network, clean):
    config = SharpnessAware(**SHORT, rho=0.7, momentum=0.0, weight_decay=0.0, label_smoothing=0.2)
    network = network.double()  # at the perturbed weights rounding errors of the first gradient grow
    loop = config.make_loop(network, clean)
    images, labels = clean.images[:16].double(), clean.labels[:16]
    plain = copy.deepcopy(network).train()
    weights = list(plain.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(plain(images), labels, label_smoothing=0.2), weights)
    once = bits(plain)  # statistics after one pass
    norm = sum((w * g).square().sum() for w, g in zip(weights, gradients, strict=True)).sqrt()
    before = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, gradients, strict=True):
            w.add_(0.7 * w.square() * g / norm)
    gradients = torch.autograd.grad(F.cross_entropy(plain(images), labels, label_smoothing=0.2), weights)
    loop._pruned = []
    loop.network.train()
    loop.optimizer.param_groups[0]["lr"] = 0.1
    loop.update((images, labels))
    for old, new, gradient in zip(before, loop.network.parameters(), gradients, strict=True):
        torch.testing.assert_close(old - 0.1 * gradient, new.detach(), atol=1e-6, rtol=1e-4)
    for name, tensor in loop.network.named_buffers():
        torch.testing.assert_close(tensor, once[name], msg=name)


def test_the_rate_of_sharpness_aware_tuning():
    config = SharpnessAware(lr=0.01)
    assert [config.learning_rate(done) for done in (0, 200)] == [0.01, pytest.approx(0.005)]
    assert config.learning_rate(399) < 1e-6


# ---- BAN


def test_the_noise_is_that_of_anp(network, clean):
    loop = NoisyTuning(**SHORT).make_loop(network, clean)
    loop.network.train()
    _, _, d, x = loop.draw(torch.Generator().manual_seed(1))
    assert len(d) == len(x) == 300 and 0.2 < float(d.abs().max()) <= 0.3 and float(d.min()) < 0 < float(d.max())
    noisy, place = convert_noisy(network), 0
    for layer in noisy_layers(noisy).values():
        count = len(layer.mask)
        layer.weight_noise, layer.bias_noise = d[place : place + count], x[place : place + count]
        layer.perturbed, layer.training, place = True, True, place + count
    before = bits(loop.network)
    torch.testing.assert_close(loop.noisy_forward(clean.images, d, x), noisy(clean.images))
    assert same(before, bits(loop.network)), "running statistics are left alone"


def test_a_network_without_neurons_has_no_noise(clean):
    with pytest.raises(InputError, match="there is no neuron to mask or perturb"):
        defense("ban").repair(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), clean.images, clean.labels)


def test_both_losses_count(network, clean):
    loop = NoisyTuning(**SHORT, eps=0.0, noisy_share=0.5).make_loop(network, clean)
    loop.network.train()
    images, labels, d, x = loop.draw(torch.Generator().manual_seed(1))
    loss, logits = loop.loss(images, labels, d, x)
    torch.testing.assert_close(loss, 1.5 * F.cross_entropy(logits, labels))
    worse = replace(loop.config, eps=0.3).make_loop(network, clean)
    worse.network.train()
    assert worse.loss(images, labels, d, x)[0] > loss
