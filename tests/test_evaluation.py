"""Evaluation of any network: folded where that computes the same, and as it is where it does not."""

import pytest
import torch
from torch import nn

from data.datasets import SYNTHETIC_NORMALIZATION, ImageSet
from data.synthetic import draw_images
from engine.evaluation import Evaluator, Metrics, Report, evaluation_batch, inference_copy


class Branching(nn.Module):
    """Its path depends on the values, so it cannot be traced."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        out = self.norm(self.conv(x))
        return (out if out.mean() > 0 else -out).mean((2, 3))


class Sharing(nn.Module):
    """One convolution before two BatchNorms."""

    def __init__(self):
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.two(self.conv(self.one(self.conv(x)))).mean((2, 3))


class Hooked(nn.Sequential):
    """A hook changes what its BatchNorm returns."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self[1].register_forward_hook(lambda module, inputs, output: 2 * output)


class Reading(nn.Module):
    """Its convolution's weights are also read directly."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)).mean((2, 3)) + self.conv.weight.sum()


def with_statistics(network):
    """Give BatchNorms statistics and scales that are not the identity."""
    torch.manual_seed(0)
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        for tensor in (norm.weight.data, norm.running_var):
            tensor.uniform_(0.5, 2)
        for tensor in (norm.bias.data, norm.running_mean):
            tensor.normal_()
    return network.eval()


@pytest.mark.parametrize("kind", [Branching, Sharing, Hooked, Reading])
def test_a_network_that_cannot_be_folded_is_evaluated_as_it_is(kind):
    network, x = with_statistics(kind()), torch.randn(8, 3, 12, 12)
    copy = inference_copy(network, torch.float32)
    assert any(isinstance(module, nn.BatchNorm2d) for module in copy.modules())
    torch.testing.assert_close(copy(x), network(x))


def test_the_copy_is_another_network():
    network = with_statistics(Branching())
    with torch.no_grad():
        inference_copy(network, torch.bfloat16).norm.weight.zero_()
    assert network.norm.weight.all() and network.norm.weight.dtype == torch.float32


@pytest.fixture(scope="module")
def drawn():
    return ImageSet(*draw_images(60, "test"), 10)


def test_normalisation_reaches_the_network(drawn):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)).eval()
    pixels = (drawn.images.float() / 255 - 0.5) / 0.25  # (60, 32, 32, 3)
    logits = network(pixels.permute(0, 3, 1, 2))
    report = Evaluator(drawn, None, SYNTHETIC_NORMALIZATION, torch.float32)(network)
    assert report.clean.loss == pytest.approx(nn.functional.cross_entropy(logits, drawn.labels).item(), rel=1e-5)
    assert report.clean.accuracy == pytest.approx((logits.argmax(1) == drawn.labels).float().mean().item())


@pytest.mark.parametrize(
    ("size", "count"), [((32, 32), 500), ((16, 16), 500), ((64, 64), 125), ((48, 40), 266), ((4000, 4000), 1)]
)
def test_fewer_of_large_ones_are_measured_at_once(size, count):
    assert evaluation_batch(size) == count
    images = ImageSet(torch.zeros(1, *size, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), 2)
    assert Evaluator(images, None, SYNTHETIC_NORMALIZATION, torch.float32).batch_size == count


def test_the_batch_size_changes_nothing(drawn):
    network = nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    reports = [
        Evaluator(drawn, None, SYNTHETIC_NORMALIZATION, torch.float32, batch_size=size)(network) for size in (7, 500)
    ]
    assert reports[0].clean.accuracy == reports[1].clean.accuracy
    assert reports[0].clean.loss == pytest.approx(reports[1].clean.loss, rel=1e-6)


def test_a_report_comes_back_from_a_saved_state():
    report = Report(Metrics(0.5, 0.9), None, Metrics(0.25, 0.875))
    assert Report.from_state_dict(report.state_dict()) == report
    assert report.rounded() == {"clean_accuracy": 90.0, "defender_accuracy": 87.5}
    assert report.row() == {"clean loss": 0.5, "defender loss": 0.25, "C-Acc %": 90.0, "defender acc %": 87.5}
