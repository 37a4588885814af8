"""One call does what the three steps do."""

import pytest
import torch

from defenses import AnpConfig, ChoiceConfig, mask_values, optimize_masks, repair
from defenses.defense import CleanImages
from models import convert_noisy
from models.neurons import pruned_copy, sort_neurons

CONFIG = AnpConfig(iterations=4, batch_size=16, lr=5.0)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 3, 32, 32, generator=generator), torch.randint(10, (40,), generator=generator)


def test_masks_sweep_choice_and_pruning(network, inputs):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    repaired = repair(network, *inputs, CONFIG, ChoiceConfig(threshold=0.5))
    noisy = convert_noisy(network)
    list(optimize_masks(noisy, *inputs, CONFIG))
    neurons = sort_neurons(mask_values(noisy))
    assert repaired.neurons == neurons and 0 <= neurons[0].mask < neurons[-1].mask <= 1
    assert [point.threshold for point in repaired.points][:3] == [None, 0, 0.05]
    for point, found in zip(repaired.points, repaired.accuracies, strict=True):
        assert found == CleanImages(*inputs).accuracy(pruned_copy(network, neurons[: point.count]))
    count = sum(neuron.mask <= 0.5 for neuron in neurons)
    assert repaired.choice.point.count == count and 0 < count < 300
    zeros = sum(int((module.weight == 0).sum()) for module in repaired.network.modules() if hasattr(module, "eps"))
    assert zeros == count and not repaired.network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_the_operating_point_is_chosen_by_the_clean_accuracy(network, inputs, monkeypatch):
    def falling(clean, pruned):
        count = sum(int((module.weight == 0).sum()) for module in pruned.modules() if hasattr(module, "eps"))
        return 0.9 if count <= 60 else 0.2

    monkeypatch.setattr(CleanImages, "accuracy", falling)
    repaired = repair(network, *inputs, CONFIG, ChoiceConfig(max_acc_drop=3))
    last = max(point.count for point in repaired.points if point.count <= 60)
    assert repaired.choice.point.count == last > 0


def test_progress_and_transform_see_every_iteration(network, inputs):
    seen, batches = [], []

    def progress(steps):
        for step in steps:
            seen.append(step.iteration)
            yield step

    def transform(batch, generator):
        batches.append(len(batch))
        return batch

    repair(network, *inputs, CONFIG, transform=transform, progress=progress)
    assert seen == [1, 2, 3, 4] and batches == [16] * 4


def test_accuracy_is_the_share_of_right_answers(inputs):
    class Constant(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    images, labels = inputs
    assert CleanImages(images, labels).accuracy(Constant()) == int((labels == 3).sum()) / 40 > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whatever_gradient_mode_the_caller_is_in(network, inputs, mode):
    expected = repair(network, *inputs, CONFIG).neurons
    with mode():
        assert repair(network, *inputs, CONFIG).neurons == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_other_precision(network, inputs, dtype):
    images, labels = inputs
    repaired = repair(network.to(dtype), images.to(dtype), labels, CONFIG)
    assert all(0 <= neuron.mask <= 1 for neuron in repaired.neurons) and repaired.neurons[0].mask < 1
    assert next(repaired.network.parameters()).dtype == dtype


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4).long(), "images are torch.uint8"),
        (torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int32), "labels are torch.int32"),
        (torch.zeros(4, 3, 32, 32), torch.zeros(4, 10).long(), "expected int64"),
        (torch.zeros(4, 3, 32, 32), torch.full((4,), -100), "0 or more"),
        (torch.zeros(4, 3, 32, 32), torch.zeros(5).long(), "4 images and 5 labels"),
        (torch.full((4, 3, 32, 32), torch.nan), torch.zeros(4).long(), "NaN"),
    ],
)
def test_inputs_that_mean_nothing(network, images, labels, message):
    with pytest.raises(ValueError, match=message):
        repair(network, images, labels, CONFIG)


def test_settings_that_contradict_or_drop_iterations(network, inputs):
    with pytest.raises(ValueError, match="choose one of threshold"):
        ChoiceConfig(threshold=0.1, number=2)
    with pytest.raises(
        ValueError, match=r"AnpConfig.precision = torch.int8: choose from torch.float32, torch.bfloat16"
    ):
        AnpConfig(precision=torch.int8)
    with pytest.raises(ValueError, match="progress passed on 0 of 4 iterations"):
        repair(network, *inputs, CONFIG, progress=lambda steps: [])
