"""Sweeps and the operating point: one row a point, resumed where they stopped, chosen from clean accuracy alone."""

import shutil

import pytest

import prune_neuron_cifar as prune
from defenses.pruning import ChoiceConfig, choose, threshold_points
from engine.evaluation import Evaluator, Metrics, Report
from engine.sweep import SweepLoop
from models.neurons import Neuron, neurons_up_to, sort_neurons, threshold_point
from utils.signals import Interrupted

MASKS = (0.3, 0.0, 0.2, 0.9)


@pytest.fixture
def neurons():
    return sort_neurons([Neuron("bn1", index, mask) for index, mask in enumerate(MASKS)])


def weights(network):
    """A report that tells how many neurons were left."""
    return Report(Metrics(0.0, int((network.bn1.weight != 0).sum()) / 4), None, None)


def test_a_sweep_goes_on_where_it_stopped(network, neurons):
    points = threshold_points(neurons, 1.0, 0.1)
    through, broken = (SweepLoop(network, neurons, points, weights) for _ in range(2))
    list(through.steps())
    steps = broken.steps()
    for _ in range(5):
        next(steps)
    measured = []
    resumed = SweepLoop(network, neurons, points, lambda pruned: measured.append(1) or weights(pruned))
    resumed.load_state_dict(broken.state_dict())
    assert resumed.done == 5
    list(resumed.steps())
    assert resumed.rows == through.rows and len(measured) == 1, "only 0.9 prunes more"


def test_points_at_a_threshold_are_those_of_the_definition(neurons):
    for threshold in (0.0, 0.1, 0.19999, 0.2, 0.25, 0.3, 0.89, 0.9, 1.0):
        point = threshold_point(neurons, threshold)
        expected = neurons_up_to(neurons, threshold)
        assert point.count == len(expected) and point.last == (expected[-1] if expected else None)
    assert threshold_point([], 0.5).count == 0


def test_a_point_that_was_not_measured_is_measured_now(network, neurons):
    loop = SweepLoop(network, neurons, threshold_points(neurons, 0.1, 0.1), weights)
    list(loop.steps())
    assert loop.report_of(threshold_point(neurons, 0.3)).clean.accuracy == 0.25
    assert network.bn1.weight.all(), "the network itself stays"


def test_the_choice_and_its_words(neurons):
    points = [SweepLoop(None, neurons, [], weights).points[0], *threshold_points(neurons, 0.3, 0.1)]
    accuracies = [0.9, 0.9, 0.89, 0.86, 0.5]
    fixed = choose(neurons, points, accuracies, ChoiceConfig())
    assert (fixed.point.count, fixed.reason) == (2, "the paper's fixed threshold")
    given = choose(neurons, points, accuracies, ChoiceConfig(threshold=0.05))
    assert (given.point.count, given.words) == (1, "prune every neuron with mask <= 0.05")
    budget = choose(neurons, points, accuracies, ChoiceConfig(max_acc_drop=1))
    assert budget.point == points[2] and "at most 1 point of accuracy" in budget.reason
    assert choose(neurons, points, [0.9, 0.1, 0.1, 0.1, 0.1], ChoiceConfig(max_acc_drop=0)).words == "prune nothing"


def test_an_interrupted_step_3_goes_on(trained, tmp_path, monkeypatch):
    folders = [shutil.copytree(trained, tmp_path / name) for name in ("through", "broken")]

    def run(folder, *flags):
        source = ["--checkpoint", f"{trained}/last_model.th", "--trigger-info", f"{trained}/trigger_info.th"]
        options = ["--val-frac", "0.1", "--pruning-by", "number", "--pruning-step", "150"]
        masks = ["--mask-file", f"{trained}/mask_values.txt"]
        return prune.main(["--output-dir", str(folder), *source, *masks, *options, *flags])

    assert run(folders[0]) == 0
    original, measured = Evaluator.__call__, []

    def interrupt_third(evaluator, network):
        measured.append(1)
        if len(measured) == 3:
            raise Interrupted
        return original(evaluator, network)

    monkeypatch.setattr(Evaluator, "__call__", interrupt_third)
    assert run(folders[1]) == 130
    assert not (folders[1] / "repaired_model.th").exists()
    assert run(folders[1]) == 1, "an unfinished run is not dropped without a word"
    assert run(folders[1], "--resume") == 0
    assert len(measured) == 3 + 3, "two rows of five were known; 0.2 prunes nothing and is known too"
    for name in ("pruning_by_number.txt", "repaired_model.th"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
