"""One call does what the three steps do."""

import pytest
import torch

from defenses import AnpConfig, ChoiceConfig, mask_values, optimize_masks, repair
from defenses.one_call import accuracy
from models import convert_noisy_batchnorm
from models.neurons import pruned_copy, sort_neurons

CONFIG = AnpConfig(iterations=4, batch_size=16, lr=5.0)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 3, 32, 32, generator=generator), torch.randint(10, (40,), generator=generator)


def test_masks_sweep_choice_and_pruning(network, inputs):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    repaired = repair(network, *inputs, CONFIG, ChoiceConfig(threshold=0.5))
    noisy = convert_noisy_batchnorm(network)
    list(optimize_masks(noisy, *inputs, CONFIG))
    neurons = sort_neurons(mask_values(noisy))
    assert repaired.neurons == neurons and 0 <= neurons[0].mask < neurons[-1].mask <= 1
    assert [point.threshold for point in repaired.points][:3] == [None, 0, 0.05]
    for point, found in zip(repaired.points, repaired.accuracies, strict=True):
        assert found == accuracy(pruned_copy(network, neurons[: point.count]), *inputs)
    count = sum(neuron.mask <= 0.5 for neuron in neurons)
    assert repaired.choice.point.count == count and 0 < count < 300
    zeros = sum(int((module.weight == 0).sum()) for module in repaired.network.modules() if hasattr(module, "eps"))
    assert zeros == count and not repaired.network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_the_operating_point_is_chosen_by_the_clean_accuracy(network, inputs, monkeypatch):
    accuracies = iter([0.9, 0.9, 0.88] + [0.2] * 17)
    monkeypatch.setattr("defenses.one_call.accuracy", lambda *_: next(accuracies))
    repaired = repair(network, *inputs, CONFIG, ChoiceConfig(max_acc_drop=3))
    assert repaired.choice.point is repaired.points[2]


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
    assert accuracy(Constant(), images, labels) == int((labels == 3).sum()) / 40 > 0
