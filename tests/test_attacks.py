"""Every attack: what it changes, what it leaves alone, and the formulas of the papers."""

import copy
import csv
import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim import Adam

import optimize_mask_cifar as optimize
import train_backdoor_cifar as train
from attacks import ATTACKS, CleanLabel, Workspace
from attacks.clean_label import four_corner_checkerboard
from attacks.image_folder import export_poisoned
from attacks.input_aware import InputAwareTrainConfig, diversity, mask_loss
from attacks.pgd import pgd
from attacks.sig import sinusoid
from data.augment import normalize, random_crop_flip, random_rotate
from data.datasets import SYNTHETIC_NORMALIZATION, Dataset, ImageSet
from data.synthetic import CLASSES
from data.triggers import Trigger, triggered_test_set
from engine.evaluation import Evaluator, crossed, evaluate, inference_copy
from engine.runtime import Runtime
from formats.subject import load_surrogate
from models import ModelConfig, build_model
from models.generator import Generator, doubled, mask_of, pattern_of
from tests.small import interrupt_after
from utils.errors import InputError
from utils.files import sha256_of
from utils.seeding import seeded_generator

FP32 = torch.float32
STATIC = ["badnets", "badnets-all", "blend", "sig"]


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (500, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(500) % 10, 10)


def workspace_of(images, held=None, folder=None, overwrite=False, seed=0):
    """What step 1 lends; the test set is the training set."""
    dataset = Dataset("drawn", SYNTHETIC_NORMALIZATION, True, CLASSES, images, images)
    held = torch.arange(len(images)) if held is None else held
    runtime, model = Runtime(torch.device("cpu"), FP32), ModelConfig("resnet18", 1 / 16)
    return Workspace(
        dataset, held, "of a split", seed, folder, overwrite, runtime, model, lambda steps, *_: iter(steps)
    )


def poison(name, images, held=None, folder=None, overwrite=False, seed=0, **settings):
    return ATTACKS[name].from_given(settings).carry_out(workspace_of(images, held, folder, overwrite, seed))


# ---- all attacks that poison once


@pytest.mark.parametrize("name", STATIC)
def test_what_is_poisoned_and_what_stays(name, images):
    index = torch.arange(50, 500)
    options = {"poison_rate": 0.1, **({} if name == "badnets-all" else {"poison_target": 2})}
    poisoned = poison(name, images, index, **options)
    chosen = poisoned.index
    assert len(chosen.unique()) == len(chosen)
    changed = torch.isin(torch.arange(450), chosen)
    assert torch.equal(poisoned.train.images[changed], poisoned.trigger.stamp(images.images[index[changed]]))
    assert torch.equal(poisoned.train.images[~changed], images.images[index[~changed]])
    assert torch.equal(poisoned.train.labels[~changed], images.labels[index[~changed]])
    before, after = images.labels[index[changed]], poisoned.train.labels[changed]
    candidates, expected = {
        "badnets-all": (450, (before + 1) % 10),
        "sig": (45, before),
    }.get(name, (405, torch.full_like(before, 2)))
    assert len(chosen) == int(0.1 * candidates) and torch.equal(after, expected)
    if name == "sig":
        assert (before == 2).all()
    elif name != "badnets-all":
        assert (before != 2).all()


@pytest.mark.parametrize("name", STATIC)
def test_the_given_set_stays_as_it_is(name, images):
    given = dataclasses.replace(images, images=images.images.clone(), labels=images.labels.clone())
    poisoned = ATTACKS[name]().poison(given)
    assert torch.equal(given.images, images.images) and torch.equal(given.labels, images.labels)
    assert not torch.equal(poisoned.train.images, images.images)


@pytest.mark.parametrize("name", STATIC)
def test_the_seed_decides_which_images(name, images):
    one, again, other = (poison(name, images, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.train.images, again.train.images)
    assert not torch.equal(one.index, other.index)
    assert torch.equal(one.trigger.pattern, other.trigger.pattern)


@pytest.mark.parametrize("name", STATIC)
def test_rates_and_targets_out_of_range(name, images):
    with pytest.raises(InputError, match="--poison-rate"):
        poison(name, images, poison_rate=0.001)
    if name != "badnets-all":
        with pytest.raises(InputError, match="--poison-target 10"):
            poison(name, images, poison_target=10)


def test_each_image_has_its_own_trigger_however_many_there_are():
    count = 2500  # stamped in parts
    pattern = torch.arange(count).remainder(251).to(torch.uint8)[:, None, None, None].expand(count, 2, 2, 1)
    trigger = Trigger(pattern, torch.ones(count, 2, 2, 1).double(), 1.0, None)
    black = torch.zeros(count, 2, 2, 3, dtype=torch.uint8)
    index = torch.arange(count).flip(0)
    assert torch.equal(trigger.stamp(black, index), pattern.flip(0).expand(count, 2, 2, 3))
    triggered = triggered_test_set(ImageSet(black, torch.arange(count) % 10, 10), trigger)
    assert torch.equal(triggered.images[:, 0, 0, 0], pattern[:, 0, 0, 0])
    assert torch.equal(triggered.labels, torch.arange(1, count + 1) % 10)


def test_poison_rate_counts_non_target_images(images):
    assert len(poison("badnets", images).index) == 22  # 5 % of 450


# ---- patterns


def test_badnets_pixels(images):
    stamped = poison("badnets", images).trigger.stamp(images.images[:20])
    corner = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    for channel in range(3):
        assert (stamped[:, 29:, 29:, channel] == corner).all()
    rest = torch.ones(32, 32, dtype=torch.bool)
    rest[29:, 29:] = False
    assert torch.equal(stamped[:, rest], images.images[:20][:, rest])


def test_badnets_all_counts_every_test_image(images):
    triggered = triggered_test_set(images, poison("badnets-all", images).trigger)
    assert torch.equal(triggered.labels, (images.labels + 1) % 10)


def test_four_corners():
    pattern, mask = four_corner_checkerboard(32, 32)
    right = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    left = torch.tensor([[255, 0, 0], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    plane = pattern[0, ..., 0]
    for rows in (slice(0, 3), slice(29, 32)):
        assert torch.equal(plane[rows, 29:], right) and torch.equal(plane[rows, :3], left)
    assert mask.sum() == 36 and mask[0, :3, :3].all() and mask[0, 29:, :3].all()


def test_blend_noise_is_stored_and_blended(images):
    trigger = poison("blend", images).trigger
    assert trigger.pattern.shape == (1, 32, 32, 3) and trigger.mask.all() and trigger.alpha == 0.2
    assert 100 < trigger.pattern.float().mean() < 155 and trigger.pattern.float().std() > 60


def test_sig_signal(images):
    pattern, mask = sinusoid(32, 32, 40, 6)
    for column in range(32):
        expected = 40 * math.sin(2 * math.pi * column * 6 / 32)
        assert pattern[0, :, column, 0].tolist() == pytest.approx([expected] * 32, abs=1e-5)
    assert mask.all()
    gray = torch.full((2, 32, 32, 3), 128, dtype=torch.uint8)
    stamped = poison("sig", images).trigger.stamp(gray)
    signal = [math.floor(128 + 40 * round(math.sin(2 * math.pi * j * 6 / 32), 9)) for j in range(32)]
    assert stamped[0, 5, :, 1].tolist() == signal
    black = poison("sig", images).trigger.stamp(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    assert black.max() == 40 and black.min() == 0
    assert len(triggered_test_set(images, poison("sig", images).trigger)) == 450


# ---- clean-label


def clean_label_folder(folder, images):
    changed = images.images.clone()
    changed[images.labels == 0] = 7
    np.save(folder / "train_images.npy", changed.numpy())
    np.save(folder / "train_labels.npy", images.labels.numpy())
    return changed


def test_clean_label_reads_a_published_set(tmp_path, images):
    changed = clean_label_folder(tmp_path, images)
    index = torch.arange(499, 49, -1)  # some order of the attacker's images
    poisoned = poison("clean-label", images, index, clb_dir=str(tmp_path))
    assert torch.equal(poisoned.train.images, changed[index])
    assert torch.equal(poisoned.train.labels, images.labels[index])
    assert set(index[poisoned.index].tolist()) == set(index[images.labels[index] == 0].tolist())


def test_clean_label_bad_folders(tmp_path, images):
    def read(**options):
        return poison("clean-label", images, clb_dir=str(tmp_path), **options)

    with pytest.raises(InputError, match="no such file"):
        read()
    clean_label_folder(tmp_path, images)
    with pytest.raises(InputError, match=r"classes \[0\], expected --poison-target 4"):
        read(poison_target=4)
    np.save(tmp_path / "train_labels.npy", images.labels.numpy()[::-1])
    with pytest.raises(InputError, match="keeps the dataset's labels"):
        read()
    np.save(tmp_path / "train_images.npy", images.images.numpy()[:7])
    with pytest.raises(InputError, match=r"expected one array of whole numbers of shape \(500, 32, 32, 3\)"):
        read()
    np.save(tmp_path / "train_images.npy", images.images.numpy().astype(">i8") + 256)
    with pytest.raises(InputError, match="expected 0 to 255"):
        read()
    np.save(tmp_path / "train_images.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="write it with numpy"):
        read()


@pytest.fixture
def surrogate(tmp_path, network):
    """A network that has never seen the images, without a card."""
    torch.save(network.state_dict(), tmp_path / "surrogate.th")
    return {"clb_surrogate": str(tmp_path / "surrogate.th")}


def test_clean_label_builds_a_set(tmp_path, images, surrogate):
    index = torch.arange(499, 49, -1)
    poisoned = poison("clean-label", images, index, tmp_path, clb_steps=2, **surrogate)
    chosen = index[poisoned.index]
    assert len(chosen) == int(0.8 * 45) and (images.labels[chosen] == 0).all() and (chosen >= 50).all()
    assert torch.equal(poisoned.train.labels, images.labels[index]), "no label ever changes"
    changed = torch.isin(index, chosen)
    assert torch.equal(poisoned.train.images[~changed], images.images[index[~changed]])
    _, mask = four_corner_checkerboard(32, 32)
    stamped = poisoned.trigger.stamp(poisoned.train.images[changed])
    assert torch.equal(stamped, poisoned.train.images[changed]), "the trigger is on it"
    away = (poisoned.train.images[changed].int() - images.images[index[changed]].int()).abs()
    assert 0 < (away * (1 - mask)).max() <= 4  # 2 steps of 1.5, truncated
    again = poison("clean-label", images, index, clb_dir=str(tmp_path / "clean_label_set"))
    assert torch.equal(again.train.images, poisoned.train.images)


def test_clean_label_from_python_is_the_same(tmp_path, images, surrogate, network):
    from_files = poison("clean-label", images, None, tmp_path, clb_steps=2, **surrogate)
    attack = CleanLabel(clb_steps=2)
    poisoned = attack.poison(images, 0, network, SYNTHETIC_NORMALIZATION)
    assert torch.equal(poisoned.train.images, from_files.train.images)
    assert set(poisoned.index.tolist()) == set(from_files.index.tolist())
    in_train_mode = attack.poison(images, 0, network.train(), SYNTHETIC_NORMALIZATION)
    assert torch.equal(in_train_mode.train.images, poisoned.train.images)
    with pytest.raises(ValueError, match="needs a surrogate"):
        attack.poison(images)


def test_a_surrogate_is_loaded_for_evaluation(images, surrogate, network):
    model = ModelConfig("resnet18", 1 / 16)
    path = surrogate["clb_surrogate"]
    loaded, normalization = load_surrogate(path, model, "drawn", images, SYNTHETIC_NORMALIZATION, "of a split")
    assert not any(module.training for module in loaded.modules()) and normalization == SYNTHETIC_NORMALIZATION
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), network.eval()(x))


def test_another_set_is_replaced_only_when_asked(tmp_path, images, surrogate):
    def build(**options):
        poison("clean-label", images, None, tmp_path, clb_steps=1, **surrogate, **options)
        return (tmp_path / "clean_label_set" / "train_images.npy").stat().st_mtime_ns

    first = build()
    assert build() == first
    with pytest.raises(InputError, match="another clean-label set is there"):
        build(seed=1)
    assert (tmp_path / "clean_label_set" / "train_images.npy").stat().st_mtime_ns == first, "nothing was lost"
    second = build(seed=1, overwrite=True)
    assert second != first
    np.save(tmp_path / "clean_label_set" / "train_images.npy", images.images.numpy())  # damaged
    damaged = (tmp_path / "clean_label_set" / "train_images.npy").stat().st_mtime_ns
    assert build(seed=1) != damaged


def test_an_interrupted_build_goes_on(tmp_path, images, surrogate, monkeypatch):
    """Finished batches are kept, and the set is the same as one built in one go."""
    import attacks.clean_label as module

    monkeypatch.setattr(module, "pgd_batch", lambda device: 10)
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()
    attack = CleanLabel(clb_steps=3, **surrogate)
    expected = attack.carry_out(workspace_of(images, None, tmp_path / "whole"))
    taken = []

    def track(steps, total, done, *_):
        assert total == 12
        for step in steps:
            taken.append(done)
            if len(taken) == 8:
                raise KeyboardInterrupt
            yield step

    workspace = dataclasses.replace(workspace_of(images, None, tmp_path / "parts"), track=track)
    with pytest.raises(KeyboardInterrupt):
        attack.carry_out(workspace)
    assert len(list((tmp_path / "parts" / "clean_label_set").glob("part_*.npy"))) == 2
    resumed = attack.carry_out(workspace)
    assert len(taken) == 8 + 6 and taken[-1] == 6, "two of four batches are not computed again"
    assert torch.equal(resumed.train.images, expected.train.images)
    assert not list((tmp_path / "parts" / "clean_label_set").glob("part_*.npy"))


def test_on_a_gpu_more_images_are_perturbed_at_a_time_with_the_same_result(images, network, monkeypatch):
    import attacks.clean_label as module

    assert [module.pgd_batch(torch.device(name)) for name in ("cpu", "cuda")] == [100, 500]
    sets = []
    for size in (100, 9):
        monkeypatch.setattr(module, "pgd_batch", lambda device, size=size: size)
        sets.append(CleanLabel(clb_steps=1).poison(images, 0, network, SYNTHETIC_NORMALIZATION).train.images)
    assert (sets[0] != sets[1]).float().mean() < 1e-4  # where the gradient is 0 but for rounding
    assert (sets[0] != images.images).any()


def test_the_opacity_of_a_set_is_the_one_it_was_built_with(tmp_path, images, surrogate):
    built = poison("clean-label", images, None, tmp_path, clb_steps=1, trigger_alpha=0.3, **surrogate)
    assert built.trigger.alpha == 0.3
    folder = str(tmp_path / "clean_label_set")

    def opacity(**given):
        return poison("clean-label", images, clb_dir=folder, **given).trigger.alpha

    assert opacity() == 0.3
    with pytest.raises(InputError, match=r"--trigger-alpha 0\.5"):
        opacity(trigger_alpha=0.5)
    (tmp_path / "clean_label_set" / "recipe.json").unlink()  # as with a published set
    assert opacity() == 1.0 and opacity(trigger_alpha=0.5) == 0.5


def test_surrogates_that_are_refused_or_doubtful(tmp_path, images, surrogate, capsys):
    def build(**options):
        poison("clean-label", images, None, tmp_path, clb_steps=1, **surrogate, **options)

    build()
    assert "no card" in capsys.readouterr().out
    card = {"card_version": 1, "sha256": sha256_of(surrogate["clb_surrogate"]), "widen_factor": 1 / 16}
    for changes, message in (
        ({"dataset": "cifar10"}, "a network for 'cifar10'"),
        ({"split": {"sha256": "0"}}, "another split"),
        ({"arch": "alexnet"}, "arch = 'alexnet': choose from"),
    ):
        (tmp_path / "surrogate.json").write_text(json.dumps({**card, **changes}))
        with pytest.raises(InputError, match=message):
            build()
    (tmp_path / "surrogate.json").write_text(json.dumps({**card, "attack": {"poison_type": "badnets"}}))
    build()
    assert "backdoored itself" in capsys.readouterr().out


def test_pgd_stays_in_its_ball_and_raises_the_loss(images, network):
    folded = inference_copy(network, FP32).requires_grad_(False)
    clean = images[torch.arange(40)]

    def loss(pixels):
        return nn.functional.cross_entropy(folded(normalize(pixels, SYNTHETIC_NORMALIZATION)), clean.labels)

    before, losses = loss(clean.images), []
    for eps, steps in ((1.5, 1), (4, 10), (16, 40)):
        *_, hard = pgd(folded, clean, SYNTHETIC_NORMALIZATION, eps, steps, 1.5, FP32)
        assert hard.dtype == torch.uint8 and (hard.int() - clean.images.int()).abs().max() <= eps
        losses.append(loss(hard))
    assert before < losses[0] < losses[1] < losses[2]


def test_pgd_step_by_step(images, network):
    """One step is truncate(x + step_size * sign(gradient)), clipped, with the gradient of autograd on the pixels."""
    folded = inference_copy(network, FP32).requires_grad_(False)
    clean = images[torch.arange(8)]
    x = clean.images.permute(0, 3, 1, 2).float().requires_grad_()
    nn.functional.cross_entropy(folded((x / 255 - 0.5) / 0.25), clean.labels).backward()
    expected = (x.detach() + 3 * x.grad.sign()).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    (ours,) = pgd(folded, clean, SYNTHETIC_NORMALIZATION, 16, 1, 3, FP32)
    assert (ours != expected).float().mean() < 1e-3  # where the gradient is 0 but for rounding


# ---- input-aware


def test_generator_shapes():
    for channels in (1, 3):
        generator = Generator(channels)
        assert generator(torch.randn(2, 3, 32, 32)).shape == (2, channels, 32, 32)
        assert isinstance(generator.layers[-1], nn.BatchNorm2d)
        norms = [m for m in generator.modules() if isinstance(m, nn.BatchNorm2d)]
        convs = [m for m in generator.modules() if isinstance(m, nn.Conv2d)]
        assert len(norms) == len(convs) == 13 and all(m.momentum == 0.05 and m.eps == 1e-5 for m in norms)
        assert [m.out_channels for m in convs] == [32, 32, 64, 64, 128, 128, 128, 128, 64, 64, 32, 32, channels]
        assert all(m.bias is not None for m in convs)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [(4, 6), (1, 2)])
def test_the_gpus_way_to_double_an_image_is_the_interpolation(size, dtype, near):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, *size, generator=generator).to(dtype, memory_format=torch.channels_last).requires_grad_()
    ours, theirs = doubled(x), nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, theirs, atol=near, rtol=0)
    weights = torch.rand(theirs.shape, generator=generator).to(dtype)
    gradients = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (ours, theirs))
    torch.testing.assert_close(*gradients, atol=4 * near, rtol=0)


def test_on_the_cpu_a_generator_interpolates_as_it_always_did(monkeypatch):
    monkeypatch.setattr("models.generator.doubled", None)
    generator, x = Generator(1, 0.1), torch.randn(2, 3, 8, 8)
    plain = copy.deepcopy(generator)
    for index, layer in enumerate(plain.layers):
        if isinstance(layer, nn.Upsample):
            plain.layers[index] = nn.Upsample(scale_factor=2, mode="bilinear")
    assert torch.equal(generator(x), plain(x)) and list(generator.state_dict()) == list(plain.state_dict())


def test_input_aware_formulas():
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    assert torch.allclose(pattern_of(x), torch.tanh(x) / 2 + 0.5)
    assert torch.allclose(mask_of(x), torch.tanh(20 * (torch.tanh(x) / 2 + 0.5) - 10) / 2 + 0.5)
    a, b, c, d = torch.rand(4, 5, 3, 8, 8, dtype=torch.float64).unbind()
    rms = lambda t: (t**2).mean((1, 2, 3)).sqrt()  # noqa: E731
    expected = (rms(a - b) / (rms(c - d) + 1e-7)).mean()
    assert torch.allclose(diversity(a, b, c, d), expected)
    assert torch.allclose(mask_loss(a, b, c, d), expected + 100 * (c - 0.032).clamp(min=0).mean())


def loop_of(name, images, epochs=2, **settings):
    attack = ATTACKS[name](**settings)
    torch.manual_seed(0)
    config = InputAwareTrainConfig(epochs, 50)
    dataset = Dataset("drawn", SYNTHETIC_NORMALIZATION, True, CLASSES, images, images)
    return attack.make_loop(build_model("resnet18", 10, 1 / 16), attack.poison(images), dataset, config)


@pytest.fixture(scope="module")
def some(images):
    return images[torch.arange(200)]


def test_published_lengths_and_schedules(some):
    loop = loop_of("iab-one", some, 600)
    assert loop.mask_epochs == 25
    rates = [loop.learning_rate(epoch) for epoch in (0, 9.9, 10, 20, 25, 124.9, 125, 225, 325, 425, 599)]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4, 1e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-6])
    pattern = [loop.pattern_config.learning_rate(epoch) for epoch in (0, 199.9, 200, 300, 400, 500)]
    assert pattern == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
    short = loop_of("iab-one", some, 24)
    assert short.mask_epochs == 1 and short.network_config.milestones == pytest.approx((4, 8, 12, 16))


def run_epoch(loop, epoch):
    loop.done = epoch * loop.batches
    counts = []
    for count in loop.steps():
        counts.append(count)
        if loop.due():
            break
    assert sum(counts) == len(loop.train)


def test_each_phase_trains_its_own_networks(some):
    loop = loop_of("iab-one", some)

    def weights():
        return [next(net.parameters()).clone() for net in (loop.network, loop.pattern_net, loop.mask_net)]

    start = weights()
    run_epoch(loop, 0)
    middle = weights()
    assert [torch.equal(a, b) for a, b in zip(start, middle, strict=True)] == [True, True, False]
    frozen = {name: value.clone() for name, value in loop.mask_net.state_dict().items()}
    assert not loop.is_trained()
    run_epoch(loop, 1)
    assert [torch.equal(a, b) for a, b in zip(middle, weights(), strict=True)] == [False, False, True]
    assert all(torch.equal(value, frozen[name]) for name, value in loop.mask_net.state_dict().items())


def test_gradients_are_those_of_the_last_step_alone(some, monkeypatch):
    """Both optimisers are zeroed: after an epoch the gradients are the last loss's, not the sum of all."""
    import attacks.input_aware as module

    loop, losses = loop_of("iab-one", some), []
    original = module._step

    def recording(loss, *optimizers):
        nets = loop.pattern_net, loop.network
        losses.append([torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)[0] for net in nets])
        original(loss, *optimizers)

    monkeypatch.setattr(module, "_step", recording)
    run_epoch(loop, 1)
    assert len(losses) == 4
    for net, last in zip((loop.pattern_net, loop.network), losses[-1], strict=True):
        torch.testing.assert_close(next(net.parameters()).grad, last)


@pytest.mark.parametrize("name", ["iab-one", "iab-all"])
def test_a_joint_step_against_the_formulas(name, some, monkeypatch):
    """10 % with their own trigger and the attacker's label, 10 % with another image's trigger, the rest clean."""
    import attacks.input_aware as module

    loop, seen = loop_of(name, some), {}
    network, pattern_net, mask_net = copy.deepcopy((loop.network, loop.pattern_net, loop.mask_net))
    loop.network.register_forward_pre_hook(lambda net, inputs: seen.setdefault("inputs", inputs[0].detach()))
    monkeypatch.setattr(module, "_step", lambda loss, *optimizers: None)
    x1, x2 = (normalize(some.images[part], SYNTHETIC_NORMALIZATION) for part in (slice(0, 50), slice(100, 150)))
    labels = some.labels[:50]
    loss, correct = loop._joint_step(x1, x2, labels, 0.5)

    mask_net.eval()
    with torch.no_grad():
        own = (torch.tanh(pattern_net(x1[:5])) / 2 + 0.5 - 0.5) / 0.25
        cross = (torch.tanh(pattern_net(x2[5:10])) / 2 + 0.5 - 0.5) / 0.25
        triggered = x1[:5] + (own - x1[:5]) * mask_of(mask_net(x1[:5]))
        crossed = x1[5:10] + (cross - x1[5:10]) * mask_of(mask_net(x2[5:10]))
        inputs = torch.cat([triggered, crossed, x1[10:]])
        torch.testing.assert_close(seen["inputs"], inputs, atol=1e-4, rtol=1e-4)
        expected_labels = labels.clone()
        expected_labels[:5] = (labels[:5] + 1) % 10 if name == "iab-all" else 0
        logits = network(inputs)
        expected = nn.functional.cross_entropy(logits, expected_labels) + diversity(x1[:5], x2[5:10], own, cross)
    torch.testing.assert_close(loss.detach(), expected, atol=1e-3, rtol=1e-3)
    assert correct == (logits.argmax(1) == expected_labels).sum()


@pytest.mark.parametrize("step", ["_mask_step", "_joint_step"])
def test_both_images_of_a_pair_are_cropped_flipped_and_rotated_anew(some, monkeypatch, step):
    loop, seen, epoch = loop_of("iab-one", some), [], ["_mask_step", "_joint_step"].index(step)
    monkeypatch.setattr(loop, step, lambda *given: seen.extend(given[:2]) or torch.zeros(()))
    same = torch.arange(50).expand(2, 50)
    loop.train_batch(same, epoch, 1)
    for images, name in zip(seen, ("augmentation", "second augmentation"), strict=True):
        generator = seeded_generator(0, name, epoch, 1)
        expected = random_rotate(random_crop_flip(some.images[:50], generator, 5), generator, 10)
        torch.testing.assert_close(images, normalize(expected, SYNTHETIC_NORMALIZATION))
    assert not torch.equal(*seen)


def test_pairs_come_from_two_independent_orders(some):
    loop = loop_of("iab-one", some)
    first, second = torch.cat(loop.order(0), dim=1)
    assert torch.equal(first.sort().values, torch.arange(200)) and torch.equal(second.sort().values, torch.arange(200))
    assert (first == second).sum() < 10 and not torch.equal(first, torch.cat(loop.order(1), dim=1)[0])


def test_the_generators_are_trained_with_the_published_adam(some):
    loop = loop_of("iab-one", some)
    for optimizer, network in ((loop.mask_optimizer, loop.mask_net), (loop.pattern_optimizer, loop.pattern_net)):
        (group,) = optimizer.param_groups
        assert group["params"] == list(network.parameters())
        assert (type(optimizer), group["lr"], group["betas"], group["weight_decay"]) == (Adam, 0.01, (0.5, 0.9), 0)


def test_input_aware_rates_out_of_range(some):
    with pytest.raises(InputError, match=r"--cross-rate 0.01 of a batch of 50 images is none"):
        loop_of("iab-one", some, cross_rate=0.01)
    with pytest.raises(InputError, match="leave no clean image"):
        loop_of("iab-one", some, poison_rate=0.9)
    with pytest.raises(InputError, match="--poison-target 12"):
        loop_of("iab-one", some, poison_target=12)
    small = dataclasses.replace(some, images=some.images[:, :28, :28])
    with pytest.raises(InputError, match="multiples of 8, not 28x28"):
        loop_of("iab-one", small)


def test_mask_density_falls_towards_its_bound(some):
    loop = loop_of("iab-one", some)
    inputs = normalize(some.images, SYNTHETIC_NORMALIZATION)
    loop.mask_net.train()
    before = mask_of(loop.mask_net(inputs)).mean().item()
    for _ in range(2):
        run_epoch(loop, 0)
    mask = mask_of(loop.mask_net(inputs))
    assert 0 < mask.mean() < 0.7 * before


@pytest.mark.parametrize("name", ["iab-one", "iab-all"])
def test_trigger_of_each_test_image(name, some):
    loop = loop_of(name, some)
    trigger = loop.draw_trigger(some)
    report = Evaluator(some, trigger, SYNTHETIC_NORMALIZATION, FP32, cross=True)(loop.network)
    assert trigger.pattern.shape == (200, 32, 32, 3) and trigger.pattern.dtype == torch.uint8
    assert trigger.mask.shape == (200, 32, 32, 1) and trigger.mask.min() >= 0 and trigger.mask.max() <= 1
    expected = (some.labels + 1) % 10 if name == "iab-all" else torch.zeros(200, dtype=torch.int64)
    assert torch.equal(trigger.target, expected)
    assert len(triggered_test_set(some, trigger)) == (200 if name == "iab-all" else 180)
    right = crossed(some, trigger).images
    for number in (0, 7, 199):  # image i with the trigger of image i + 1, the last with that of the first
        other = torch.tensor([(number + 1) % 200])
        assert torch.equal(right[number], trigger.stamp(some.images[number : number + 1], other)[0])
    folded = inference_copy(loop.network, FP32)
    wrong_triggers = ImageSet(right, some.labels, 10)
    assert report.cross.accuracy == evaluate(folded, wrong_triggers, SYNTHETIC_NORMALIZATION, FP32).accuracy
    # what the network saw in training, up to the rounding of pixels
    loop.pattern_net.eval(), loop.mask_net.eval(), loop.network.eval()
    inputs = normalize(some.images[:8], SYNTHETIC_NORMALIZATION)
    with torch.no_grad():
        _, applied = loop._apply(inputs, inputs)
    stamped = normalize(trigger.stamp(some.images[:8], torch.arange(8)), SYNTHETIC_NORMALIZATION)
    assert (applied - stamped).abs().max() < 2 / 255 / 0.25


# ---- folders of pictures


@pytest.fixture
def exported(tmp_path, images):
    workspace = workspace_of(images, torch.arange(499, 49, -1))
    poisoned = ATTACKS["badnets"]().carry_out(workspace)
    export_poisoned(workspace, poisoned, tmp_path / "set")
    return tmp_path / "set", poisoned


def read(folder, images, held=None):
    return poison("folder", images, held, poisoned_dir=str(folder))


def table(folder):
    with (folder / "poisoned.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write(folder, rows):
    with (folder / "poisoned.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_exported_folder_round_trips(exported, images, capsys):
    folder, poisoned = exported
    again = read(folder, images, torch.arange(50, 500))
    assert torch.equal(again.train.images, poisoned.train.images)
    assert torch.equal(again.train.labels, poisoned.train.labels)
    assert torch.equal(again.index, poisoned.index.sort().values)
    rows = table(folder)
    marked = [row for row in rows if row["poisoned"] == "1"]
    assert len(rows) == 450 and {row["label"] for row in marked} == {"0"} and len(marked) == 20
    assert all(row["file"] == f"{row['label']}/{int(row['index']):05d}.png" for row in rows)
    fewer = read(folder, images, torch.arange(100, 500))
    assert len(fewer.train) == 400 and len(fewer.index) < len(again.index)
    assert torch.equal(fewer.train.images[fewer.index], fewer.trigger.stamp(fewer.train.images[fewer.index]))
    assert "50 of 450 images are held out" in capsys.readouterr().out


def test_somebody_elses_folder(exported, images, capsys):
    folder, poisoned = exported
    write(folder, [{"file": row["file"], "label": row["label"]} for row in table(folder)])
    (folder / "trigger_info.th").unlink()
    again = read(folder, images)
    assert torch.equal(again.train.images, poisoned.train.images) and again.trigger is None
    out = capsys.readouterr().out
    assert "no column index" in out and "attack success rate is not known" in out


def test_export_leaves_other_files_alone(exported, images, tmp_path):
    folder, poisoned = exported
    before = (folder / "poisoned.csv").stat().st_mtime_ns
    workspace = workspace_of(images, torch.arange(499, 49, -1))
    export_poisoned(workspace, poisoned, folder)  # the same set
    assert (folder / "poisoned.csv").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="another set is there"):
        export_poisoned(workspace, ATTACKS["badnets"]().poison(workspace.train, seed=1), folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match="other files are there"):
        export_poisoned(workspace, poisoned, tmp_path / "mine")


def test_an_interrupted_export_starts_again(images, tmp_path):
    workspace = workspace_of(images)
    poisoned = ATTACKS["badnets"]().carry_out(workspace)

    def track(steps, *_):
        yield next(steps)
        raise KeyboardInterrupt

    interrupted = dataclasses.replace(workspace, track=track)
    with pytest.raises(KeyboardInterrupt):
        export_poisoned(interrupted, poisoned, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    export_poisoned(workspace, poisoned, tmp_path / "set")
    assert {path.name for path in tmp_path.iterdir()} == {"set"}
    assert torch.equal(read(tmp_path / "set", images).train.images, poisoned.train.images)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder, rows: (folder / "poisoned.csv").unlink(), "no such file"),
        (lambda folder, rows: (folder / "poisoned.csv").write_bytes(b"\xff\xfe\x00"), "save it as UTF-8"),
        (lambda folder, rows: (folder / "poisoned.csv").write_text("name,class\na,1\n"), "the columns file, label"),
        (lambda folder, rows: (folder / "poisoned.csv").write_text("file,label\na\n"), "full rows"),
        (lambda folder, rows: write(folder, [{**rows[0], "label": "10"}, *rows[1:]]), "label 10 is outside 0..9"),
        (lambda folder, rows: write(folder, [{**rows[0], "label": "cat"}, *rows[1:]]), "label is not a whole number"),
        (lambda folder, rows: write(folder, [{**rows[0], "index": "500"}, *rows[1:]]), "index 500 is outside"),
        (lambda folder, rows: write(folder, [rows[0], *rows]), "an index repeats"),
        (lambda folder, rows: write(folder, [{**rows[0], "file": "../a.png"}, *rows[1:]]), "outside the folder"),
        (lambda folder, rows: write(folder, rows[:1]), "names 1 images"),
        (lambda folder, rows: (folder / rows[3]["file"]).unlink(), "no such file"),
        (
            lambda folder, rows: (folder / rows[3]["file"]).write_bytes(b"\x89PNG\r\n\x1a\n123"),
            "not a readable picture",
        ),
        (lambda folder, rows: Image.new("RGB", (28, 28)).save(folder / rows[3]["file"]), "28x28 RGB pixels, expected"),
        (lambda folder, rows: Image.new("RGBA", (32, 32)).save(folder / rows[3]["file"]), "32x32 RGBA pixels"),
        (lambda folder, rows: Image.new("1", (14000, 14000)).save(folder / rows[3]["file"]), "not a readable picture"),
        (lambda folder, rows: write(folder, [{**rows[0], "original_label": "5"}, *rows[1:]]), "original_label differs"),
        (lambda folder, rows: (folder / "trigger_info.th").write_bytes(b"no"), "cannot be read|refused"),
    ],
)
def test_bad_folders(exported, images, damage, message):
    folder, _ = exported
    damage(folder, table(folder))
    with pytest.raises(InputError, match=message) as caught:
        read(folder, images)
    assert "\n" not in str(caught.value)


# ---- every entry of the registry


@pytest.fixture
def inputs(surrogate, tmp_path, images):
    """The settings that an attack cannot do without."""
    export_poisoned(workspace_of(images), ATTACKS["sig"]().poison(images), tmp_path / "set")
    return {"clean-label": {"clb_steps": 1, **surrogate}, "folder": {"poisoned_dir": str(tmp_path / "set")}}


@pytest.mark.parametrize("name", ATTACKS)
def test_every_training_goes_on_exactly_from_the_middle_of_any_epoch(name, images, inputs, tmp_path):
    train_set = images[torch.arange(100)] if name not in inputs else images
    poisoned = poison(name, train_set, folder=tmp_path, **inputs.get(name, {}))

    def make_loop(seed):
        torch.manual_seed(seed)
        attack = ATTACKS[name].from_given(inputs.get(name, {}))
        config = attack.train_config(epochs=2, batch_size=50)
        dataset = Dataset("drawn", SYNTHETIC_NORMALIZATION, True, CLASSES, train_set, train_set)
        small = dataclasses.replace(poisoned, train=poisoned.train[torch.arange(100)])
        return attack.make_loop(build_model("resnet18", 10, 1 / 16), small, dataset, config)

    def rows(loop):
        return [loop.row() for _ in loop.steps() if loop.due()]

    through = make_loop(0)
    states = [io.BytesIO() for _ in range(through.total)]
    expected = []
    for state, _ in zip(states, through.steps(), strict=True):
        torch.save(through.state_dict(), state)
        expected += [through.row()] if through.due() else []
    assert [row["epoch"] for row in expected] == [1, 2]
    for done in (1, 3):
        states[done - 1].seek(0)
        resumed = make_loop(1)
        resumed.load_state_dict(torch.load(states[done - 1]))
        assert rows(resumed) == expected[done // 2 :]
        for part in ("network", *(["mask_net", "pattern_net"] if name.startswith("iab") else [])):
            ours, through_it = getattr(resumed, part).state_dict(), getattr(through, part).state_dict()
            assert all(torch.equal(value, through_it[key]) for key, value in ours.items()), part


COMMON = ["--dataset", "tiny", "--widen-factor", "0.0625", "--epoch", "2", "--batch-size", "128", "--threads", "1"]


@pytest.fixture
def flags(request, tmp_path, trained):
    """The flags that an attack cannot do without."""
    if request.param == "folder":
        export = ["--poison-type", "sig", "--export-poisoned", str(tmp_path / "set")]
        assert train.main([*COMMON, *export, "--output-dir", str(tmp_path / "first")]) == 0
    needed = {
        "clean-label": ["--clb-surrogate", str(trained / "last_model.th"), "--clb-steps", "1"],
        "folder": ["--poisoned-dir", str(tmp_path / "set")],
    }
    return [*COMMON, "--poison-type", request.param, *needed.get(request.param, [])]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flags"), [(name, name) for name in ATTACKS], indirect=["flags"], ids=ATTACKS)
def test_every_attack_end_to_end(name, flags, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    assert train.main([*flags, "--output-dir", str(folder)]) == 0
    card = json.loads((folder / "last_model.json").read_text())
    assert card["attack"]["poison_type"] == name
    iab = name.startswith("iab")
    assert ("cross_trigger_accuracy" in card["metrics"]) == (folder / "generators.th").exists() == iab
    files = [path.name for path in folder.glob("*.th")]
    if name == "benign":
        assert files.count("trigger_info.th") == 0 and "attack_success_rate" not in card["metrics"]
    else:
        assert (folder / "clean_and_triggered.png").read_bytes()[:4] == b"\x89PNG"
        source = ["--checkpoint", str(folder / "last_model.th"), "--trigger-info", str(folder / "trigger_info.th")]
        options = ["--val-frac", "0.1", "--nb-iter", "1", "--print-every", "1", "--batch-size", "32", "--threads", "1"]
        assert optimize.main([*source, *options, "--output-dir", str(folder)]) == 0
        first = json.loads((folder / "optimize_log.jsonl").read_text().splitlines()[1])
        assert first["ASR %"] == pytest.approx(card["metrics"]["attack_success_rate"], abs=0.01)
    if name == "folder":
        assert (folder / "last_model.th").read_bytes() == (tmp_path / "first" / "last_model.th").read_bytes()

    interrupted = tmp_path / "interrupted"
    for batches, resume in ((2, []), (5, ["--resume"])):  # in the first epoch, then in the second
        with monkeypatch.context() as patch:
            interrupt_after(patch, batches)
            assert train.main([*flags, "--output-dir", str(interrupted), *resume]) == 130
    assert not (interrupted / "last_model.th").exists()
    assert train.main([*flags, "--output-dir", str(interrupted), "--resume"]) == 0
    for file in files:
        assert (interrupted / file).read_bytes() == (folder / file).read_bytes(), file


@pytest.mark.parametrize("name", ["benign", "sig", "iab-all"])
def test_what_step_1_leaves_in_its_folder(name, tmp_path):
    flags = [*COMMON, "--poison-type", name, "--poison-rate", "0.5"]
    assert train.main([*(flags[:-2] if name == "benign" else flags), "--output-dir", str(tmp_path)]) == 0
    card = json.loads((tmp_path / "last_model.json").read_text())
    figures = {"benign": [], "sig": ["attack_success_rate"]}
    assert list(card["metrics"]) == [
        "clean_accuracy",
        *figures.get(name, ["attack_success_rate", "cross_trigger_accuracy"]),
    ]
    files = {path.name for path in tmp_path.glob("*.th")} - {"last_model.th", "model_init.th"}
    assert files == {"benign": set(), "sig": {"trigger_info.th"}}.get(name, {"trigger_info.th", "generators.th"})
    assert (tmp_path / "clean_and_triggered.png").exists() == (name != "benign")


def test_a_built_set_trains_the_same_network_again(trained, tmp_path):
    flags = [*COMMON, "--poison-type", "clean-label"]
    build = ["--clb-surrogate", str(trained / "last_model.th"), "--clb-steps", "2", "--output-dir", str(tmp_path / "a")]
    assert train.main([*flags, *build]) == 0
    folder = str(tmp_path / "a" / "clean_label_set")
    assert train.main([*flags, "--clb-dir", folder, "--output-dir", str(tmp_path / "b")]) == 0
    for name in ("last_model.th", "trigger_info.th"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    card = json.loads((tmp_path / "b" / "last_model.json").read_text())["attack"]
    assert card["trigger_alpha"] == 1 and "clb_steps" not in card, "what is not known is not claimed"


def test_inputs_are_not_overwritten(trained, tmp_path, capsys):
    for flags, message in (
        (["--poison-type", "clean-label", "--clb-surrogate", f"{tmp_path}/last_model.th"], "would be overwritten"),
        (["--poison-type", "folder", "--poisoned-dir", str(tmp_path.parent)], "holds --output-dir"),
    ):
        assert train.main([*COMMON, *flags, "--output-dir", str(tmp_path), "--overwrite"]) == 1
        assert message in capsys.readouterr().err
