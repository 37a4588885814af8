import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plain import PlainMasks
from data.augment import normalize
from data.datasets import SYNTHETIC_NORMALIZATION
from data.synthetic import draw_images
from defenses import AnpConfig, AnpState, mask_values, optimize_masks
from defenses import anp as module
from defenses.anp import _iterate, apply_masks, draw_batch
from formats.checkpoints import load_strictly, read_state_dict
from models import build_model, convert_noisy_batchnorm, noisy_layers


@pytest.fixture
def images():
    return torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    return torch.arange(40) % 10


def settings(**changes):
    return AnpConfig(**{"batch_size": 16, "iterations": 4, **changes})


@pytest.mark.parametrize(
    "changes", [{}, {"steps": 3}, {"steps": 3, "project": True}, {"alpha": 1.0}, {"alpha": 0.0}, {"lr": 0.02}]
)
def test_equals_the_plain_loop(network, images, labels, changes):
    config = settings(**changes)
    # With several steps a gradient near 0 may take the other sign for rounding, and its noise another path.
    loss_tolerance, mask_tolerance = (1e-4, 2e-4) if config.steps == 1 else (2e-2, 2e-2)
    noisy, plain = convert_noisy_batchnorm(network), PlainMasks(network, config)
    state = AnpState.start(noisy)
    for step in optimize_masks(noisy, images, labels, config, state=state):
        batch, batch_labels, *noise = draw_batch(images, labels, len(state.mask), config, step.iteration - 1)
        loss = plain.iterate(batch, batch_labels, noise)
        assert step.loss.item() == pytest.approx(loss, rel=loss_tolerance)
        torch.testing.assert_close(state.mask, plain.mask(), atol=mask_tolerance, rtol=0)
    assert (1 - state.mask).max() > 30 * mask_tolerance or config.steps > 1


def test_only_the_masks_change(network, images, labels):
    noisy = convert_noisy_batchnorm(network)
    before = copy.deepcopy(noisy.state_dict())
    for _ in optimize_masks(noisy, images, labels, settings()):
        assert not any(p.grad is not None or p.requires_grad for p in noisy.parameters())
    for name, tensor in noisy.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    masks = torch.tensor([neuron.mask for neuron in mask_values(noisy)])
    assert ((masks >= 0) & (masks <= 1)).all() and (masks < 1).any()
    assert not noisy.training and not any(layer.perturbed for layer in noisy_layers(noisy).values())


@pytest.mark.parametrize(("project", "bound"), [(False, 0.8), (True, 0.4)])
@pytest.mark.parametrize("steps", [1, 4])
def test_noise_bounds(network, images, labels, monkeypatch, project, bound, steps):
    noises, original = [], module._ascend

    def watch(loss_of, mask, noise, config):
        assert max(part.abs().max() for part in noise) <= 0.4
        result = original(loss_of, mask, noise, config)
        noises.extend(result)
        return result

    monkeypatch.setattr(module, "_ascend", watch)
    list(optimize_masks(convert_noisy_batchnorm(network), images, labels, settings(project=project, steps=steps)))
    largest = max(noise.abs().max().item() for noise in noises)
    assert largest <= bound + 1e-6
    assert project or largest > 0.4


def test_the_ascent_raises_the_loss(network, images, labels, monkeypatch):
    original = module._ascend

    def watch(loss_of, mask, noise, config):
        after = original(loss_of, mask, noise, config)
        assert loss_of(mask, after)[0] > loss_of(mask, noise)[0]
        return after

    monkeypatch.setattr(module, "_ascend", watch)
    list(optimize_masks(convert_noisy_batchnorm(network), images, labels, settings()))


def test_eps_zero_is_the_natural_loss_alone(network, images, labels):
    noisy = convert_noisy_batchnorm(network)
    reference = copy.deepcopy(noisy)
    config = settings(eps=0.0, iterations=1)
    step = next(iter(optimize_masks(noisy, images, labels, config)))
    batch, batch_labels, *_ = draw_batch(images, labels, 300, config, 0)
    for layer in noisy_layers(reference).values():
        layer.train()
        layer.mask.requires_grad_()
    loss = F.cross_entropy(reference(batch), batch_labels)
    loss.backward()
    assert step.loss == step.natural_loss == step.perturbed_loss
    assert step.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for ours, layer in zip(noisy_layers(noisy).values(), noisy_layers(reference).values(), strict=True):
        torch.testing.assert_close(ours.mask, (1 - 0.2 * layer.mask.grad).clamp(0, 1), atol=1e-5, rtol=0)


def test_batches_are_drawn_with_replacement_and_transformed(network, labels):
    images, seen = torch.arange(40).float(), []

    def transform(batch, generator):
        seen.append(batch)
        return torch.randn(len(batch), 3, 32, 32, generator=generator)

    list(optimize_masks(convert_noisy_batchnorm(network), images, labels, settings(batch_size=64), transform))
    assert len(seen) == 4 and all(len(batch) == 64 for batch in seen)  # more than there are images
    assert len(torch.cat(seen).unique()) > 35 and not torch.equal(seen[0], seen[1])


def test_resumes_exactly(network, images, labels):
    through, broken = convert_noisy_batchnorm(network), convert_noisy_batchnorm(network)
    list(optimize_masks(through, images, labels, settings()))
    state = AnpState.start(broken)
    list(itertools.islice(optimize_masks(broken, images, labels, settings(), state=state), 2))
    assert state.iteration == 2
    fresh = convert_noisy_batchnorm(network)
    list(optimize_masks(fresh, images, labels, settings(), state=AnpState(2, state.mask.clone(), state.momentum)))
    assert mask_values(fresh) == mask_values(through)


def test_the_seed_decides(network, images, labels):
    results = []
    for seed in (0, 0, 1):
        noisy = convert_noisy_batchnorm(network)
        list(optimize_masks(noisy, images, labels, settings(seed=seed)))
        results.append(mask_values(noisy))
    assert results[0] == results[1] != results[2]


def test_bfloat16_ends_in_the_same_place(trained):
    network = build_model("resnet18", 10, 0.125)
    load_strictly(network, read_state_dict(trained / "last_model.th"), "last_model.th")
    images, labels = draw_images(200, "train")

    def transform(batch, generator):
        return normalize(batch, SYNTHETIC_NORMALIZATION)

    masks = []
    for precision, seed in ((torch.float32, 0), (torch.bfloat16, 0), (torch.float32, 1)):
        noisy = convert_noisy_batchnorm(network)
        config = AnpConfig(precision=precision, iterations=4, seed=seed)
        list(optimize_masks(noisy, images, labels, config, transform))
        masks.append(torch.tensor([neuron.mask for neuron in mask_values(noisy)]))
    _, rounding, other_seed = torch.corrcoef(torch.stack(masks))[0].tolist()
    assert rounding > 0.85 and rounding > other_seed, (rounding, other_seed)


def test_no_host_sync_inside_an_iteration(network, images, labels):
    """On CUDA the iteration is recorded as a graph, which a sync would break."""

    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.name()
            assert "_local_scalar_dense" not in name and "nonzero" not in name, name
            return function(*args, **(kwargs or {}))

    noisy = convert_noisy_batchnorm(network)
    config, state = settings(), AnpState.start(noisy)
    batch = draw_batch(images, labels, len(state.mask), config, 0)
    with NoSync():
        _iterate(noisy, config, state, batch)


@pytest.mark.parametrize(
    "changes",
    [{"eps": -0.1}, {"steps": 0}, {"alpha": 1.1}, {"lr": 0}, {"momentum": 1}, {"iterations": 0}, {"batch_size": 1}],
)
def test_settings_out_of_range(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        AnpConfig(**changes)


def test_bad_calls(network, images, labels):
    with pytest.raises(ValueError, match="convert_noisy_batchnorm"):
        next(optimize_masks(network, images, labels, settings()))
    with pytest.raises(ValueError, match="39 labels"):
        next(optimize_masks(convert_noisy_batchnorm(network), images, labels[:39], settings()))


def test_apply_masks(network, images):
    noisy = convert_noisy_batchnorm(network).eval()
    for layer in noisy_layers(noisy).values():
        layer.mask = torch.rand(layer.num_features)
    masked = apply_masks(network.eval(), noisy)
    torch.testing.assert_close(masked(images), noisy(images))
    assert not noisy_layers(masked)


def test_any_network_dropout_stays_off(monkeypatch):
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 3))
    noisy, modes, original = convert_noisy_batchnorm(network), [], module._iterate

    def watch(network, *rest):
        modes.append((network[1].training, network[2].training))
        return original(network, *rest)

    monkeypatch.setattr(module, "_iterate", watch)
    for _ in optimize_masks(noisy, torch.randn(20, 6), torch.arange(20) % 3, settings()):
        assert not noisy[1].training
    assert modes == [(True, False)] * 4
