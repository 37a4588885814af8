import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

from data.augment import make_transform, normalize, random_crop_flip, random_rotate
from data.datasets import CIFAR10_NORMALIZATION, ImageSet, Normalization, load_dataset
from data.split import attacker_index, defender_index, draw_permutation, read_permutation, split_size
from data.synthetic import draw_images
from data.triggers import Trigger, triggered_test_set
from utils.errors import InputError
from utils.seeding import seeded_generator


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (500, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(500) % 10, 10)


# ---- split


def test_split_of_the_paper():
    permutation = draw_permutation(50_000)
    assert torch.equal(permutation.sort().values, torch.arange(50_000))
    assert torch.equal(permutation, draw_permutation(50_000))
    attacker, defender = attacker_index(permutation), defender_index(permutation, 0.01)
    assert len(attacker) == 45_000 and len(defender) == 500
    assert torch.equal(defender, permutation[:500])
    assert not set(attacker.tolist()) & set(defender_index(permutation, 0.1).tolist())


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 500), (0.0003, 15), (0.07, 3500), (0.1, 5000)])
def test_split_size_is_exact(fraction, count):
    assert split_size(fraction, 50_000) == count


@pytest.mark.parametrize("fraction", [0.11, 0.00001])
def test_defender_share_out_of_range(fraction):
    with pytest.raises(InputError, match="--val-frac"):
        defender_index(draw_permutation(1000), fraction)


def test_split_file(tmp_path):
    path = tmp_path / "split.txt"
    path.write_text("2\n0\n1\n")
    assert read_permutation(path, 3).tolist() == [2, 0, 1]
    for text, size, message in [
        ("2\n0\n1\n", 4, "3 entries"),
        ("2\n0\n2\n", 3, "repeat"),
        ("2\n0\n3\n", 3, "outside"),
        ("2\n0\n-1\n", 3, "outside"),
        ("a b c", 3, "whole numbers"),
        ("99999999999999999999999\n0\n1", 3, "whole numbers"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_permutation(path, size)
    with pytest.raises(InputError, match="no such file"):
        read_permutation(tmp_path / "none.txt", 3)


# ---- augmentation


def test_crop_and_flip_are_torchvisions(images):
    batch = images.images[:64]
    ours = random_crop_flip(batch, seeded_generator(1))
    generator = seeded_generator(1)
    top, left = torch.randint(9, (2, 64, 1), generator=generator)
    flip = torch.rand(64, 1, generator=generator) < 0.5
    seen = set()
    for number, image in enumerate(batch.permute(0, 3, 1, 2)):
        expected = TF.crop(TF.pad(image, 4), int(top[number]), int(left[number]), 32, 32)
        expected = TF.hflip(expected) if flip[number] else expected
        assert torch.equal(ours[number].permute(2, 0, 1), expected)
        seen.add((int(top[number]), bool(flip[number])))
    assert {top for top, _ in seen} == set(range(9)) and {flip for _, flip in seen} == {True, False}


def test_images_that_may_not_be_mirrored():
    """A traffic sign that says left must not say right: only the crop moves it."""
    ramp = torch.arange(1, 33, dtype=torch.uint8)[None, None, :, None].expand(64, 32, 32, 3)  # rises to the right
    for flip, mirrored in ((False, False), (True, True)):
        cropped = random_crop_flip(ramp, seeded_generator(1), flip=flip)[:, 16, 8:24, 0].int()
        assert (cropped.diff(dim=1) < 0).any() == mirrored
    transform = make_transform(CIFAR10_NORMALIZATION, flip=False)
    assert (transform(ramp, seeded_generator(1))[:, 0, 16, 8:24].diff(dim=1) > 0).all()


def test_rotation_is_torchvisions():
    """On smooth pictures, where a pixel taken from the neighbour makes no difference to speak of."""
    ramp = torch.arange(32)[:, None] * 3 + torch.arange(32)[None] * 4
    batch = ramp.to(torch.uint8)[None, :, :, None].repeat(20, 1, 1, 3)
    ours = random_rotate(batch, seeded_generator(1), 10)
    angles = (2 * torch.rand(20, generator=seeded_generator(1)) - 1) * 10
    for number, angle in enumerate(angles.tolist()):
        expected = TF.rotate(batch[number].permute(2, 0, 1), angle)
        differs = (ours[number].permute(2, 0, 1).int() - expected.int()).abs() > 4
        assert differs.float().mean() < 0.01
    assert angles.min() < -5 and angles.max() > 5 and not torch.equal(ours[0], ours[1])


def test_normalize_is_torchvisions(images):
    ours = normalize(images.images[:4], CIFAR10_NORMALIZATION)
    plain = torch.stack([
        TF.normalize(TF.to_tensor(image.numpy()), CIFAR10_NORMALIZATION.mean, CIFAR10_NORMALIZATION.std)
        for image in images.images[:4]
    ])  # fmt: skip
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-6)
    assert ours.is_contiguous(memory_format=torch.channels_last)


def test_an_evaluation_first_leaves_nothing_that_training_refuses():
    """The constants are kept; made in inference mode they would break every later backward pass."""
    own = Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))  # used nowhere else, so not kept yet
    pixels = torch.rand(2, 4, 4, 3)
    with torch.inference_mode():
        normalize(pixels, own)
    pixels.requires_grad_()
    normalize(pixels, own).sum().backward()
    assert pixels.grad[0, 0, 0].tolist() == pytest.approx([1 / 255 / std for std in own.std])


# ---- triggers


def test_stamping_formula_against_numpy(images):
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    mask, alpha = rng.random((1, 32, 32, 1)), 0.2
    x = images.images[:50].numpy()
    expected = np.clip((1 - mask) * x + mask * ((1 - alpha) * x + alpha * pattern), 0, 255).astype(np.uint8)
    trigger = Trigger(torch.from_numpy(pattern), torch.from_numpy(mask), alpha, torch.tensor([0]))
    assert np.array_equal(trigger.stamp(images.images[:50]).numpy(), expected)


def test_added_trigger_against_numpy(images):
    rng = np.random.default_rng(0)
    pattern = rng.uniform(-60, 60, (1, 32, 32, 3)).astype(np.float32)
    mask, x = rng.random((1, 32, 32, 1)), images.images[:50].numpy()
    expected = np.clip(x + mask * 0.5 * pattern.astype(np.float64), 0, 255).astype(np.uint8)
    parts = torch.from_numpy(pattern), torch.from_numpy(mask), 0.5, torch.tensor([0])
    stamped = Trigger(*parts, mode="add").stamp(images.images[:50]).numpy()
    assert np.abs(stamped.astype(int) - expected).max() <= 1 and (stamped != expected).mean() < 1e-3  # rounding


def test_triggered_test_set_leaves_out_the_target(images):
    trigger = Trigger(torch.full((1, 32, 32, 1), 9).to(torch.uint8), torch.ones(1, 32, 32, 1), 1.0, torch.tensor([3]))
    triggered = triggered_test_set(images, trigger)
    assert len(triggered) == 450 and (triggered.labels == 3).all()
    clean = images.images[images.labels != 3]
    assert torch.equal(triggered.images, trigger.stamp(clean))


def test_trigger_for_each_image(images):
    pattern = torch.arange(500).remainder(256).to(torch.uint8)[:, None, None, None].expand(500, 32, 32, 1)
    targets = (images.labels + 1) % 10
    trigger = Trigger(pattern, torch.ones(500, 32, 32, 1).double(), 1.0, targets)
    triggered = triggered_test_set(images, trigger)
    assert torch.equal(triggered.labels, targets)  # all-to-all: every image counts
    assert torch.equal(triggered.images[:, 0, 0, 0], pattern[:, 0, 0, 0])
    some = triggered_test_set(images, Trigger(pattern, trigger.mask, 1.0, torch.tensor([0])))
    assert torch.equal(some.images[:, 0, 0, 0], pattern[images.labels != 0, 0, 0, 0])


def test_trigger_that_does_not_fit(images):
    for shape, message in [((3, 32, 32, 1), "3 entries"), ((1, 28, 28, 1), "28x28"), ((1, 32, 32, 2), "32x32x2")]:
        mask = torch.ones(*shape[:3], 1).double()
        trigger = Trigger(torch.zeros(shape, dtype=torch.uint8), mask, 1.0, torch.tensor([0]))
        with pytest.raises(InputError, match=message):
            triggered_test_set(images, trigger)


# ---- datasets


def test_synthetic_set():
    images, labels = draw_images(200, "test")
    assert images.shape == (200, 32, 32, 3) and images.dtype == torch.uint8
    assert torch.equal(labels.bincount(), torch.full((10,), 20))
    again = draw_images(200, "test")
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(images, draw_images(200, "train")[0])
    assert images.float().std() > 20
    full = load_dataset("synthetic", "unused")
    assert len(full.train) == 10_000 and len(full.test) == 2_000


def test_cifar10_offline(tmp_path, monkeypatch):
    import torchvision.datasets.cifar as module

    def offline(*args, **kwargs):
        raise OSError("<urlopen error no route to host>")

    monkeypatch.setattr(module, "download_and_extract_archive", offline)
    with pytest.raises(InputError, match="--dataset synthetic") as caught:
        load_dataset("cifar10", tmp_path)
    assert "no route to host" in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cut off")
    with pytest.raises(InputError, match="no intact CIFAR-10"):
        load_dataset("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 5.0}, "alpha is 5.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"mode": "multiply"}, "mode is 'multiply'"),
        ({"mask": torch.ones(1, 3, 3, 1)}, "expected .N, H, W, C. and .N, H, W, 1."),
        ({"pattern": torch.zeros(32, 32, 3)}, "expected .N, H, W, C."),
    ],
)
def test_triggers_that_mean_nothing(changes, message):
    parts = {"pattern": torch.zeros(1, 32, 32, 3), "mask": torch.ones(1, 32, 32, 1), "alpha": 1.0, "target": None}
    Trigger(**parts)
    with pytest.raises(ValueError, match=message):
        Trigger(**{**parts, **changes})


def test_one_label_for_each_image():
    images = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
    for labels in (torch.zeros(5).long(), torch.zeros(4), torch.zeros(4, 10).long()):
        with pytest.raises(ValueError, match="expected int64"):
            ImageSet(images, labels, 10)
