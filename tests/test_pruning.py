import copy

import pytest
import torch
from torch import nn

from benchmarks.plain import plain_evaluate
from data.augment import normalize
from data.datasets import SYNTHETIC_NORMALIZATION, ImageSet
from data.synthetic import draw_images
from defenses.pruning import ChoiceConfig, SweepConfig, choose, largest_within_drop, number_points, threshold_points
from engine.evaluation import Evaluator, Metrics, Report, evaluate, inference_copy
from engine.sweep import SweepLoop
from models import ARCHITECTURES, build_model
from models.neurons import Neuron, PruningPoint, neurons_up_to, prune_neurons, pruned_copy, sort_neurons


def neurons(*masks):
    return [Neuron("bn1", index, mask) for index, mask in enumerate(masks)]


def test_sorting_keeps_file_order_among_ties():
    order = [neuron.index for neuron in sort_neurons(neurons(0.5, 0.0, 0.5, 0.0))]
    assert order == [1, 3, 0, 2]
    assert [neuron.index for neuron in neurons_up_to(neurons(0.5, 0.2, 0.21), 0.2)] == [1]


def test_thresholds_are_exact_and_never_past_the_maximum():
    points = threshold_points(neurons(0.0, 0.1, 0.15, 0.3), 0.3, 0.05)
    assert [point.threshold for point in points] == [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    assert [point.count for point in points] == [1, 1, 2, 3, 3, 3, 4]
    assert points[2].last == Neuron("bn1", 1, 0.1)
    assert [p.threshold for p in threshold_points([], 0.2, 0.1)] == [0.0, 0.1, 0.2]
    assert [p.threshold for p in threshold_points([], 0.25, 0.1)] == [0.0, 0.1, 0.2]
    assert len(threshold_points([], 0.9, 0.05)) == 19


def test_numbers_never_run_past_the_end():
    ten = neurons(*(n / 10 for n in range(10)))
    assert [point.count for point in number_points(ten, 100, 4)] == [4, 8]
    assert [point.count for point in number_points(ten, 10, 5)] == [5, 10]
    assert [point.count for point in number_points(ten, 7, 3)] == [3, 6]
    assert number_points(ten, 10, 5)[-1] == PruningPoint(10, ten[9], None)
    with pytest.raises(ValueError, match="step"):
        number_points(ten, 10, 0)


def test_pruning_zeroes_gamma_and_nothing_else(network):
    before = copy.deepcopy(network.state_dict())
    prune_neurons(network, [Neuron("layer1.0.bn1", 2, 0.0), Neuron("layer2.0.shortcut.1", 0, 0.1)])
    for name, tensor in network.state_dict().items():
        expected = before[name].clone()
        if name == "layer1.0.bn1.weight":
            expected[2] = 0
        if name == "layer2.0.shortcut.1.weight":
            expected[0] = 0
        assert torch.equal(tensor, expected), name
    out = network.layer1[0].bn1.eval()(torch.randn(2, 4, 5, 5))
    assert (out[:, 2] == network.layer1[0].bn1.bias[2]).all()


@pytest.mark.parametrize(
    ("neuron", "message"),
    [
        (Neuron("bn9", 0, 0), "no layer 'bn9' with neurons"),
        (Neuron("conv1", 0, 0), "conv1"),
        (Neuron("bn1", 4, 0), "channel 4"),
    ],
)
def test_pruning_what_is_not_there_changes_nothing(network, neuron, message):
    with pytest.raises(ValueError, match=message):
        prune_neurons(network, [Neuron("bn1", 0, 0), neuron])
    assert network.bn1.weight.all()


def test_sweep_measures_the_pruned_network(network):
    masks = sort_neurons([Neuron("bn1", index, mask) for index, mask in enumerate((0.3, 0.0, 0.2, 0.9))])
    weight, calls = network.bn1.weight.clone(), []

    def evaluate_weight(pruned):
        assert not pruned.training
        calls.append(1)
        return pruned.bn1.weight.tolist()

    rows = list(SweepLoop(network, masks, threshold_points(masks, 0.5, 0.1), evaluate_weight).steps())
    expected = [set(), {1}, {1}, {1, 2}, {1, 2, 0}, {1, 2, 0}, {1, 2, 0}]
    for row, pruned in zip(rows, expected, strict=True):
        assert {index for index, value in enumerate(row.report) if value == 0} == pruned
        assert row.point.count == len(pruned)
    assert len(calls) == 4, "a point that prunes nothing new is not measured again"
    assert torch.equal(network.bn1.weight, weight)


def weights_as_report(pruned):
    """Stands for an evaluation: tells every pruned network from the others."""
    return Report(Metrics(0.0, pruned.bn1.weight.sum().item()), None, None)


def test_a_saved_sweep_goes_on_exactly(network):
    masks = sort_neurons(neurons(0.3, 0.0, 0.2, 0.9))
    through, broken, resumed = (
        SweepLoop(network, masks, threshold_points(masks, 0.5, 0.1), weights_as_report) for _ in range(3)
    )
    list(through.steps())
    for _ in zip(range(4), broken.steps(), strict=False):
        pass
    resumed.load_state_dict(broken.state_dict())
    assert resumed.done == 4
    list(resumed.steps())
    assert resumed.rows == through.rows


def test_any_point_is_reported_as_it_was_pruned(network):
    masks = sort_neurons(neurons(0.3, 0.0, 0.2, 0.9))
    loop = SweepLoop(network, masks, threshold_points(masks, 0.2, 0.2), weights_as_report)
    list(loop.steps())
    for count in range(5):
        expected = weights_as_report(pruned_copy(network, masks[:count]))
        assert loop.report_of(PruningPoint(count, None, None)) == expected


@pytest.mark.parametrize(("by", "column"), [("threshold", "threshold"), ("number", "mask")])
def test_a_row_of_the_sweep_says_what_was_pruned(network, by, column):
    masks = sort_neurons(neurons(0.3, 0.0, 0.2, 0.9))
    points = SweepConfig(by, pruning_max={"threshold": 0.2, "number": 3}[by]).points(masks)
    loop = SweepLoop(network, masks, points, weights_as_report)
    rows = [loop.row() for _ in loop.steps()]
    assert column in loop.columns and loop.columns.keys() <= {
        *rows[0],
        "defender acc %",
        "clean loss",
        "C-Acc %",
        "ASR %",
    }
    assert rows[0]["pruned"] == 0 and rows[0][column] is None and len(rows) == loop.total == 1 + len(points)
    last = {"pruned": 3, "pruned %": 75, "layer": "bn1", "neuron": 0, "mask": 0.3, "threshold": None}
    if by == "threshold":
        last = {"pruned": 2, "pruned %": 50, "layer": "bn1", "neuron": 2, "mask": 0.2, "threshold": 0.2}
    assert rows[-1] == last


def test_operating_point_from_clean_accuracy():
    accuracies = [0.9, 0.9, 0.89, 0.87, 0.875, 0.5]
    assert [largest_within_drop(accuracies, drop) for drop in (0.03, 0.01, 0, 1)] == [4, 2, 1, 5]


@pytest.mark.parametrize(
    ("config", "count", "words"),
    [
        (ChoiceConfig(), 2, "prune every neuron with mask <= 0.2"),
        (ChoiceConfig(threshold=0.3), 3, "prune every neuron with mask <= 0.3"),
        (ChoiceConfig(threshold=0.0), 1, "prune every neuron with mask <= 0"),
        (ChoiceConfig(max_acc_drop=2), 1, "prune every neuron with mask <= 0.1"),
        (ChoiceConfig(max_acc_drop=5), 2, "prune every neuron with mask <= 0.2"),
        (ChoiceConfig(max_acc_drop=100), 3, "prune every neuron with mask <= 0.3"),
    ],
)
def test_choice(config, count, words):
    masks = sort_neurons(neurons(0.3, 0.0, 0.2, 0.9))
    points = [PruningPoint(0, None, None), *threshold_points(masks, 0.3, 0.1)]
    choice = choose(masks, points, [0.90, 0.90, 0.885, 0.86, 0.5], config)
    assert (choice.point.count, choice.words) == (count, words)


@pytest.mark.parametrize(
    ("config", "count", "words", "reason"),
    [
        (ChoiceConfig(), 1, "prune the 1 neurons of smallest mask, up to 0", "at most 3 points"),
        (ChoiceConfig(number=3), 3, "prune the 3 neurons of smallest mask, up to 0.3", "--number"),
        (ChoiceConfig(number=0), 0, "prune nothing", "--number"),
        (ChoiceConfig(threshold=0.2), 2, "prune every neuron with mask <= 0.2", "--threshold"),
        (ChoiceConfig(max_acc_drop=5), 2, "prune the 2 neurons of smallest mask, up to 0.2", "at most 5 points"),
    ],
)
def test_choice_in_a_sweep_by_number(config, count, words, reason):
    """The paper's threshold is no point of such a sweep, so it is not taken unasked."""
    masks = sort_neurons(neurons(0.3, 0.0, 0.2, 0.9))
    points = [PruningPoint(0, None, None), *number_points(masks, 4, 1)]
    choice = choose(masks, points, [0.90, 0.90, 0.86, 0.5, 0.1], config)
    assert (choice.point.count, choice.words) == (count, words) and reason in choice.reason


def test_no_more_neurons_than_there_are():
    masks = sort_neurons(neurons(0.3, 0.0))
    with pytest.raises(ValueError, match="3 neurons cannot be pruned, there are 2"):
        choose(masks, [PruningPoint(0, None, None)], [0.9], ChoiceConfig(number=3))


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "vgg19_bn", "MobileNetV2"])
def test_folding_computes_the_same(arch):
    torch.manual_seed(0)
    network = build_model(arch, 10, 1 / 8)
    images = torch.randn(8, 3, 32, 32)
    for _ in range(3):
        network.train()(images)  # running statistics that are not the identity
    layer = next(name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d))
    prune_neurons(network, [Neuron(layer, 0, 0.0)])
    network.eval()
    folded = inference_copy(network, torch.float32)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(images), network(images), atol=1e-4, rtol=1e-4)
    assert arch in ARCHITECTURES and any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


class Watched(nn.Module):
    """Refuses to run in train mode; cannot be traced, and so not folded."""

    def forward(self, x):
        assert not self.training
        return x if x.sum() > 0 else x + 0


@pytest.mark.parametrize("last", [nn.Identity(), Watched()], ids=["folded", "unfolded"])
def test_a_network_in_train_mode_is_evaluated_in_eval_mode(last):
    torch.manual_seed(0)
    body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network = nn.Sequential(*body, last, nn.Linear(8, 10)).train()
    images = ImageSet(*draw_images(40, "test"), 10)
    evaluator = Evaluator(images, None, SYNTHETIC_NORMALIZATION, torch.float32)
    before, report = copy.deepcopy(network.state_dict()), evaluator(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    inputs = normalize(images.images, SYNTHETIC_NORMALIZATION)
    expected = nn.functional.cross_entropy(network.eval()(inputs), images.labels).item()
    assert report.clean.loss == pytest.approx(expected, rel=1e-4) and report == evaluator(network.train())


def test_evaluation_is_the_mean_over_samples(network):
    image_set = ImageSet(*draw_images(730, "test"), 10)  # no multiple of the batch size
    ours = evaluate(inference_copy(network, torch.float32), image_set, SYNTHETIC_NORMALIZATION, torch.float32)
    batches = [
        (normalize(image_set.images[:300], SYNTHETIC_NORMALIZATION), image_set.labels[:300]),
        (normalize(image_set.images[300:], SYNTHETIC_NORMALIZATION), image_set.labels[300:]),
    ]
    loss, accuracy = plain_evaluate(network, batches)
    assert ours.loss == pytest.approx(loss, rel=1e-4) and ours.accuracy == pytest.approx(accuracy, abs=1e-9)


def test_pruned_copy_leaves_the_original(network):
    pruned = pruned_copy(network, [Neuron("bn1", 1, 0.0)])
    assert pruned.bn1.weight[1] == 0 and network.bn1.weight[1] != 0
