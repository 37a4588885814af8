import copy
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.plain import PlainMasks
from data.augment import normalize, random_crop_flip
from data.datasets import CIFAR10_NORMALIZATION, SYNTHETIC_NORMALIZATION, ImageSet
from data.synthetic import draw_images
from defenses import AnpConfig, AnpState, mask_values, optimize_masks, score
from defenses import anp as module
from defenses.anp import MaskLoop, _iterate, apply_masks, draw_batch, draw_batches, hold_frozen
from engine.cuda_graph import record
from formats.checkpoints import load_strictly, read_state_dict
from formats.mask_file import read_masks, write_masks
from formats.subject import Subject
from models import build_model, convert_noisy, noisy_layers
from models.neurons import neurons_up_to
from tests.replay import Replay


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
    noisy, plain = convert_noisy(network), PlainMasks(network, config)
    state = AnpState.start(noisy)
    for step in optimize_masks(noisy, images, labels, config, state=state):
        batch, batch_labels, *noise = draw_batch(images, labels, state.mask.numel(), config, step.iteration - 1)
        loss = plain.iterate(batch, batch_labels, noise)
        assert step.loss.item() == pytest.approx(loss, rel=loss_tolerance)
        torch.testing.assert_close(state.mask, plain.mask()[None], atol=mask_tolerance, rtol=0)
    assert (1 - state.mask).max() > 30 * mask_tolerance or config.steps > 1


def test_a_step_reports_what_the_network_was_before_its_update(network, images, labels):
    noisy, config = convert_noisy(network), settings()
    masked = apply_masks(network, noisy).train()
    for step in optimize_masks(noisy, images, labels, config):
        batch, batch_labels, *_ = draw_batch(images, labels, 300, config, step.iteration - 1)
        logits = masked(batch)
        assert step.natural_loss.item() == pytest.approx(F.cross_entropy(logits, batch_labels).item(), rel=1e-4)
        assert step.accuracy.item() == pytest.approx((logits.argmax(1) == batch_labels).float().mean().item())
        mixed = 0.2 * step.natural_loss + 0.8 * step.perturbed_loss
        assert step.loss.item() == pytest.approx(mixed.item(), rel=1e-5)
        masked = apply_masks(network, noisy).train()


def test_losses_are_computed_in_float32_under_bfloat16(network, images, labels):
    noisy, outputs = convert_noisy(network), []
    noisy.register_forward_hook(lambda network, inputs, output: outputs.append(output.detach()))
    config = settings(precision=torch.bfloat16, iterations=1)
    (step,) = optimize_masks(noisy, images, labels, config)
    _, batch_labels, *_ = draw_batch(images, labels, 300, config, 0)
    for loss, logits in ((step.natural_loss, outputs[1]), (step.perturbed_loss, outputs[2])):  # the first: the ascent
        assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
        assert loss.item() == pytest.approx(F.cross_entropy(logits.float(), batch_labels).item(), rel=1e-6)


def test_only_the_masks_change(network, images, labels):
    noisy = convert_noisy(network)
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
    noises, original = [], module.ascend

    def watch(loss_of, mask, noise, configs):
        assert max(part.abs().max() for part in noise) <= 0.4
        result = original(loss_of, mask, noise, configs)
        noises.extend(result)
        return result

    monkeypatch.setattr(module, "ascend", watch)
    list(optimize_masks(convert_noisy(network), images, labels, settings(project=project, steps=steps)))
    largest = max(noise.abs().max().item() for noise in noises)
    assert largest <= bound + 1e-6
    assert project or largest > 0.4


def test_the_ascent_raises_the_loss(network, images, labels, monkeypatch):
    original = module.ascend

    def watch(loss_of, mask, noise, configs):
        after = original(loss_of, mask, noise, configs)
        assert loss_of(mask, after)[0] > loss_of(mask, noise)[0]
        return after

    monkeypatch.setattr(module, "ascend", watch)
    list(optimize_masks(convert_noisy(network), images, labels, settings()))


def test_eps_zero_is_the_natural_loss_alone(network, images, labels):
    noisy = convert_noisy(network)
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

    list(optimize_masks(convert_noisy(network), images, labels, settings(batch_size=64), transform))
    assert len(seen) == 4 and all(len(batch) == 64 for batch in seen)  # more than there are images
    assert len(torch.cat(seen).unique()) > 35 and not torch.equal(seen[0], seen[1])


def test_the_perturbation_starts_uniformly_in_the_whole_ball(images, labels):
    _, _, *noise = draw_batch(images, labels, 10_000, settings(), 0)
    for part in noise:
        counts = torch.histc(part, 4, -0.4, 0.4)
        assert part.shape == (10_000,) and counts.sum() == 10_000 and (counts - 2500).abs().max() < 250
    assert not torch.equal(*noise)


def test_labels_stay_with_their_images(labels):
    batch, batch_labels, *_ = draw_batch(labels.float(), labels, 3, settings(batch_size=64), 0)
    assert torch.equal(batch, batch_labels.float())


def test_resumes_exactly(network, images, labels):
    through, broken = convert_noisy(network), convert_noisy(network)
    list(optimize_masks(through, images, labels, settings()))
    state = AnpState.start(broken)
    list(itertools.islice(optimize_masks(broken, images, labels, settings(), state=state), 2))
    assert state.iteration == 2
    fresh = convert_noisy(network)
    list(optimize_masks(fresh, images, labels, settings(), state=AnpState(2, state.mask.clone(), state.momentum)))
    assert mask_values(fresh) == mask_values(through)


def test_the_seed_decides(network, images, labels):
    results = []
    for seed in (0, 0, 1):
        noisy = convert_noisy(network)
        list(optimize_masks(noisy, images, labels, settings(seed=seed)))
        results.append(mask_values(noisy))
    assert results[0] == results[1] != results[2]


def test_frozen_weights_held_in_bfloat16_give_the_same_bits(network, images, labels):
    masks = []
    for precision in (torch.float32, torch.bfloat16):  # in which the frozen weights lie; bfloat16 computes both times
        noisy, config = convert_noisy(network), settings(precision=torch.bfloat16, iterations=4)
        hold_frozen(noisy, precision)
        assert noisy.conv1.weight.dtype == precision and noisy.bn1.weight.dtype == torch.float32
        list(optimize_masks(noisy, images, labels, config))
        masks.append(torch.cat([layer.mask for layer in noisy_layers(noisy).values()]))
    assert torch.equal(*masks) and masks[0].min() < 0.99


def test_bfloat16_ends_in_the_same_place(trained):
    network = build_model("resnet18", 10, 0.125)
    load_strictly(network, read_state_dict(trained / "last_model.th"), "last_model.th")
    images, labels = draw_images(200, "train")

    def transform(batch, generator):
        return normalize(batch, SYNTHETIC_NORMALIZATION)

    masks = []
    for precision, seed in ((torch.float32, 0), (torch.bfloat16, 0), (torch.float32, 1)):
        noisy = convert_noisy(network)
        config = AnpConfig(precision=precision, iterations=4, seed=seed)
        list(optimize_masks(noisy, images, labels, config, transform))
        masks.append(torch.tensor([neuron.mask for neuron in mask_values(noisy)]))
    _, rounding, other_seed = torch.corrcoef(torch.stack(masks))[0].tolist()
    assert rounding > 0.85 and rounding > other_seed, (rounding, other_seed)


@pytest.mark.parametrize("changes", [{}, {"steps": 2, "project": True}])
def test_a_recorded_optimisation_is_the_optimisation(network, images, labels, monkeypatch, changes):
    def run():
        noisy = convert_noisy(network)
        state = AnpState.start(noisy)
        steps = list(optimize_masks(noisy, images, labels, settings(**changes), state=state))
        shown = torch.cat([layer.mask for layer in noisy_layers(noisy).values()])
        return [tuple(vars(step).values()) for step in steps], state.mask, state.momentum, shown

    expected = run()
    monkeypatch.setattr(module, "replayed", lambda iterate, changed, batch: record(iterate, changed, batch, Replay()))
    with torch.no_grad():  # as a caller may have it
        recorded = run()
    for ours, eager in zip(tree_leaves(recorded), tree_leaves(expected), strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(eager))


def test_no_host_sync_inside_an_iteration(network, images, labels):
    """On CUDA the iteration is recorded as a graph, which a sync would break."""

    class NoSync(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.name()
            assert "_local_scalar_dense" not in name and "nonzero" not in name, name
            return function(*args, **(kwargs or {}))

    noisy = convert_noisy(network)
    config, state = settings(), AnpState.start(noisy)
    batch = draw_batches(images, labels, state.mask.shape[1], [config], 0)
    with NoSync():
        _iterate(noisy, [config], state, batch)


@pytest.mark.parametrize(
    "changes",
    [
        {"eps": -0.1},
        {"steps": 0},
        {"alpha": 1.1},
        {"lr": 0},
        {"momentum": 1},
        {"iterations": 0},
        {"batch_size": 1},
        {"lr": math.inf},
        {"eps": math.nan},
        {"lr": "0.1"},
        {"iterations": 2.5},
        {"steps": True},
        {"alpha": None},
        {"project": 1},
    ],
)
def test_settings_out_of_range(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        AnpConfig(**changes)


def test_bad_calls(network, images, labels):
    with pytest.raises(ValueError, match="convert_noisy"):
        next(optimize_masks(network, images, labels, settings()))
    with pytest.raises(ValueError, match="39 labels"):
        next(optimize_masks(convert_noisy(network), images, labels[:39], settings()))
    images[3, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        next(optimize_masks(convert_noisy(network), images, labels, settings()))


def test_masks_that_became_nan_are_not_passed_on(network, images):
    noisy = convert_noisy(network)
    noisy.bn1.mask[1] = math.nan
    with pytest.raises(ValueError, match="the masks are NaN"):
        mask_values(noisy)


def test_apply_masks(network, images):
    noisy = convert_noisy(network).eval()
    for layer in noisy_layers(noisy).values():
        layer.mask = torch.rand(layer.num_features)
    masked = apply_masks(network.eval(), noisy)
    torch.testing.assert_close(masked(images), noisy(images))
    assert not noisy_layers(masked)


def test_any_network_dropout_stays_off(monkeypatch):
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 3))
    noisy, modes, original = convert_noisy(network), [], module._iterate

    def watch(network, *rest):
        modes.append((network[1].training, network[2].training))
        return original(network, *rest)

    monkeypatch.setattr(module, "_iterate", watch)
    for _ in optimize_masks(noisy, torch.randn(20, 6), torch.arange(20) % 3, settings()):
        assert not noisy[1].training
    assert modes == [(True, False)] * 4


class NormDropout(nn.BatchNorm1d):
    """A BatchNorm with a dropout inside."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        return self.drop(super().forward(x))


def test_dropout_inside_a_batchnorm_stays_off(monkeypatch):
    network = nn.Sequential(nn.Linear(6, 8), NormDropout(8), nn.Linear(8, 3))
    noisy, modes, original = convert_noisy(network), [], module._iterate

    def watch(network, *rest):
        modes.append((network[1].training, network[1].drop.training))
        return original(network, *rest)

    monkeypatch.setattr(module, "_iterate", watch)
    list(optimize_masks(noisy, torch.randn(20, 6), torch.arange(20) % 3, settings()))
    assert modes == [(True, False)] * 4


# ---- as the scripts run it


def subject_of(network, flip=True):
    """The defender's view of 40 images."""
    clean = ImageSet(draw_images(40, "train")[0], torch.arange(40) % 10, 10)
    return Subject(network, CIFAR10_NORMALIZATION, flip, clean, {})


@pytest.mark.parametrize("flip", [True, False])
def test_batches_are_augmented_and_normalised(network, flip):
    subject, seen = subject_of(network, flip), []
    loop = MaskLoop(subject, settings(iterations=2, batch_size=40))

    def transform(pixels, generator):
        pixels = random_crop_flip(pixels, generator, 4, flip)
        return torch.stack([
            TF.normalize(TF.to_tensor(image.numpy()), CIFAR10_NORMALIZATION.mean, CIFAR10_NORMALIZATION.std)
            for image in pixels
        ])  # fmt: skip

    loop.noisy.register_forward_hook(lambda network, inputs, output: seen.append(inputs[0]))
    for number, _ in enumerate(loop.steps()):
        clean = subject.clean
        expected, *_ = draw_batch(clean.images, clean.labels, 300, loop.configs[0], number, transform)
        torch.testing.assert_close(seen[-1], expected, atol=1e-6, rtol=1e-6)
    assert len(seen) == 2 * 3


def rows_of(loop):
    return [loop.row() for _ in loop.steps() if loop.due()]


def test_rows_are_means_since_the_row_before(network):
    loop, accuracies = MaskLoop(subject_of(network), settings(iterations=5), row_every=2), []
    assert loop.due() and loop.row()["iteration"] == 0 and loop.row()["loss"] is None
    rows = []
    for step in loop.steps():
        accuracies.append(100 * step.accuracy.item())
        if loop.due():
            rows.append(loop.row())
    assert [row["iteration"] for row in rows] == [2, 4, 5]
    a, b, c, d, e = accuracies
    assert [row["batch acc %"] for row in rows] == pytest.approx([(a + b) / 2, (c + d) / 2, e])
    for row in rows:
        assert row["loss"] == pytest.approx(0.2 * row["natural loss"] + 0.8 * row["perturbed loss"], rel=1e-5)
    assert rows[-1]["masks <= 0.2"] == sum(neuron.mask <= 0.2 for neuron in loop.neurons())


def test_a_saved_loop_goes_on_exactly(network):
    config = settings(iterations=5)
    through, broken, resumed = (MaskLoop(subject_of(network), config, row_every=3) for _ in range(3))
    expected, file = rows_of(through), io.BytesIO()
    for _ in itertools.islice(broken.steps(), 2):
        pass
    torch.save(broken.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    assert resumed.done == 2 and resumed.neurons() == broken.neurons(), "the masks are shown at once"
    assert rows_of(resumed) == expected
    assert torch.equal(resumed.state.mask, through.state.mask)


def test_score_is_the_whole_optimisation(network):
    subject, config = subject_of(network), settings()
    loop = MaskLoop(subject, config)
    list(loop.steps())
    assert score(subject, config) == loop.neurons() != mask_values(MaskLoop(subject, config).noisy)


def test_a_mask_is_the_same_number_in_python_and_in_the_file(network, tmp_path):
    noisy = convert_noisy(network)
    noisy.bn1.mask = torch.tensor([0.20004, 0.20006, 0.2, 1.0])
    neurons = mask_values(noisy)
    write_masks(tmp_path / "mask_values.txt", neurons, "")
    assert read_masks(tmp_path / "mask_values.txt", network) == neurons
    assert [neuron.index for neuron in neurons_up_to(neurons, 0.2)] == [0, 2]
