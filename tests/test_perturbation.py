"""Networks whose neurons are perturbed: a planted neuron, and what must hold for any network."""

import copy

import pytest
import torch
from torch import nn

import defenses.perturbation as module
from defenses.defense import CleanImages
from defenses.perturbation import KINDS, PerturbationConfig, perturbed_answers
from utils.errors import InputError

TARGET, CLASSES = 2, 5
GROWING = PerturbationConfig(eps=(0.6, 0.0, 0.3), draws=3)


class Planted(nn.Module):
    """Neurons that tell the classes, and as many that drive the target class and are nearly silent on clean images."""

    def __init__(self, drive=5.0, copies=30):
        super().__init__()
        self.copies, self.norm = copies, nn.BatchNorm1d((CLASSES + 1) * copies)
        self.linear = nn.Linear(CLASSES + 1, CLASSES)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(CLASSES, CLASSES + 1))
            self.linear.weight[TARGET, CLASSES] = drive
            self.linear.bias.zero_()
            self.norm.bias.fill_(1.0)
            self.norm.bias[CLASSES * copies :] = -2.5

    def forward(self, x):
        neurons = self.norm(x.repeat_interleave(self.copies, 1)).relu()  # (B, (classes + 1) * copies)
        return self.linear(neurons.view(len(x), -1, self.copies).mean(2))


@pytest.fixture
def clean():
    """250 images of which a network sees its class's feature, and noise."""
    labels = torch.arange(250) % CLASSES
    images = 0.3 * torch.randn(250, CLASSES + 1, generator=torch.Generator().manual_seed(1))
    images[torch.arange(250), labels] += 2
    return CleanImages(images, labels)


def curve(answers, kind):
    """Mean error and mean share of the target class by eps."""
    found = {}
    for each in answers:
        if each.kind == kind:
            found.setdefault(each.eps, []).append((each.error, each.shares[TARGET]))
    return {eps: torch.tensor(rows).mean(0).tolist() for eps, rows in found.items()}


def test_a_planted_neuron_drives_answers_into_its_class(clean):
    answers = list(perturbed_answers(Planted(), clean, GROWING))
    adversarial, random = (curve(answers, kind) for kind in KINDS)
    assert list(adversarial) == list(random) == [0.0, 0.3, 0.6], "in order"
    assert adversarial[0] == random[0] == pytest.approx([0, 1 / CLASSES])
    errors, shares = zip(*adversarial.values(), strict=True)
    assert errors[0] < errors[1] < errors[2] and shares[0] < shares[1] < shares[2]
    harmless = curve(perturbed_answers(Planted(drive=0.0), clean, GROWING), "adversarial")
    assert harmless[0.6][0] < 0.05 < errors[2] and harmless[0.6][1] <= 0.2 and shares[2] > 0.25


def test_random_perturbations_are_never_worse_than_adversarial_ones(clean):
    answers = list(perturbed_answers(Planted(), clean, GROWING))
    pairs = [(one, other) for one, other in zip(answers[::2], answers[1::2], strict=True)]
    assert len(pairs) == 9 and {(one.kind, other.kind) for one, other in pairs} == {KINDS}
    assert all((one.eps, one.draw) == (other.eps, other.draw) for one, other in pairs)
    assert all(other.error < one.error if one.eps else other.error == one.error for one, other in pairs)


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_without_noise_it_is_the_network_itself(network, statistics):
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clean = CleanImages(images, torch.arange(40) % 10)
    with torch.no_grad():
        logits = copy.deepcopy(network).train(statistics == "batch")(images)
    config = PerturbationConfig(eps=(0.0,), draws=1, statistics=statistics)
    for answers in perturbed_answers(network, clean, config):
        assert answers.error == pytest.approx((logits.argmax(1) != clean.labels).float().mean().item())
        assert answers.shares == pytest.approx((logits.argmax(1).bincount(minlength=10) / 40).tolist())


def test_the_seed_decides_and_the_network_stays_as_it_was(network):
    images = torch.randn(30, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clean = CleanImages(images, torch.arange(30) % 10)
    before = copy.deepcopy(network.train()).state_dict()
    config = PerturbationConfig(eps=(0.6,), draws=2)
    first, again = (list(perturbed_answers(network, clean, config)) for _ in range(2))
    other = list(perturbed_answers(network, clean, PerturbationConfig(eps=(0.6,), draws=2, seed=1)))
    assert first == again != other and first[0].shares != first[2].shares
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_both_kinds_have_the_size_that_they_are_drawn_at(clean, monkeypatch):
    """Random ones at the corners of the eps-ball; adversarial ones inside, however many steps they take."""
    seen, original = [], module.assign

    def watch(layers, mask, noise):
        seen.append((mask, torch.stack(noise).detach()))
        original(layers, mask, noise)

    monkeypatch.setattr(module, "assign", watch)
    list(perturbed_answers(Planted(), clean, PerturbationConfig(eps=(0.2, 0.4), draws=1, steps=4)))
    assert len(seen) == 2 * (4 + 1 + 1) and all((mask == 1).all() for mask, _ in seen)
    noises = [noise for _, noise in seen]
    for eps, start, end, corner in ((0.2, 0, 4, 5), (0.4, 6, 10, 11)):
        assert noises[end].abs().max() <= eps * (1 + 1e-6) and not torch.equal(noises[start], noises[end])
        torch.testing.assert_close(noises[corner].abs(), torch.full_like(noises[corner], eps))
        assert torch.equal(noises[corner].sign(), noises[start].sign()), "one draw"
    torch.testing.assert_close(2 * noises[0], noises[6], msg="one draw for every eps")


def test_many_images_go_in_batches_and_are_counted_once():
    images = torch.randn(1100, CLASSES + 1, generator=torch.Generator().manual_seed(0))
    clean = CleanImages(images, images[:, :CLASSES].argmax(1))
    batches = []
    network = Planted()
    network.norm.register_forward_hook(lambda layer, given, result: batches.append(len(given[0])))
    for answers in perturbed_answers(network, clean, PerturbationConfig(eps=(0.0,), draws=1)):
        assert sum(answers.shares) == pytest.approx(1) and answers.error < 0.1
    assert batches == [367, 367, 366] * 2


def test_a_network_that_answers_nan_is_refused(clean):
    network = Planted()
    with torch.no_grad():
        network.linear.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN or infinite values at eps 0; is it trained"):
        list(perturbed_answers(network, clean, GROWING))
