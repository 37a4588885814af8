import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

from data.attacks import ATTACKS, AttackConfig
from data.attacks.clean_label import four_corner_checkerboard
from data.augment import normalize, random_crop_flip
from data.datasets import CIFAR10_NORMALIZATION, ImageSet, load_cifar10, load_dataset
from data.errors import InputError
from data.seeding import seeded_generator
from data.split import attacker_index, defender_index, draw_permutation, read_permutation, split_size
from data.synthetic import draw_images
from data.triggers import Trigger, triggered_test_set


def config(**changes):
    return AttackConfig(**{"target": 0, "rate": 0.05, "alpha": 1.0, "seed": 0, **changes})


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (500, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(500) % 10)


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


def test_normalize_is_torchvisions(images):
    ours = normalize(images.images[:4], CIFAR10_NORMALIZATION)
    plain = torch.stack([
        TF.normalize(TF.to_tensor(image.numpy()), CIFAR10_NORMALIZATION.mean, CIFAR10_NORMALIZATION.std)
        for image in images.images[:4]
    ])  # fmt: skip
    torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-6)
    assert ours.is_contiguous(memory_format=torch.channels_last)


# ---- triggers


def test_badnets_pixels(images):
    trigger = ATTACKS["badnets"].poison(images, torch.arange(500), config()).trigger
    stamped = trigger.stamp(images.images[:20])
    corner = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    for channel in range(3):
        assert (stamped[:, 29:, 29:, channel] == corner).all()
    rest = torch.ones(32, 32, dtype=torch.bool)
    rest[29:, 29:] = False
    assert torch.equal(stamped[:, rest], images.images[:20][:, rest])


def test_four_corners():
    pattern, mask = four_corner_checkerboard(32, 32)
    right = torch.tensor([[0, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    left = torch.tensor([[255, 0, 0], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8)
    plane = pattern[0, ..., 0]
    for rows in (slice(0, 3), slice(29, 32)):
        assert torch.equal(plane[rows, 29:], right) and torch.equal(plane[rows, :3], left)
    assert mask.sum() == 36 and mask[0, :3, :3].all() and mask[0, 29:, :3].all()


def test_stamping_formula_against_numpy(images):
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    mask, alpha = rng.random((1, 32, 32, 1)), 0.2
    x = images.images[:50].numpy()
    expected = np.clip((1 - mask) * x + mask * ((1 - alpha) * x + alpha * pattern), 0, 255).astype(np.uint8)
    trigger = Trigger(torch.from_numpy(pattern), torch.from_numpy(mask), alpha, torch.tensor([0]), torch.arange(0))
    assert np.array_equal(trigger.stamp(images.images[:50]).numpy(), expected)


def test_triggered_test_set_leaves_out_the_target(images):
    trigger = ATTACKS["badnets"].poison(images, torch.arange(500), config(target=3)).trigger
    triggered = triggered_test_set(images, trigger)
    assert len(triggered) == 450 and (triggered.labels == 3).all()
    clean = images.images[images.labels != 3]
    assert torch.equal(triggered.images, trigger.stamp(clean))


def test_trigger_for_each_image(images):
    pattern = torch.arange(500).remainder(256).to(torch.uint8)[:, None, None, None].expand(500, 32, 32, 1)
    targets = (images.labels + 1) % 10
    trigger = Trigger(pattern, torch.ones(500, 32, 32, 1).double(), 1.0, targets, torch.arange(0))
    triggered = triggered_test_set(images, trigger)
    assert torch.equal(triggered.labels, targets)  # all-to-all: every image counts
    assert torch.equal(triggered.images[:, 0, 0, 0], pattern[:, 0, 0, 0])
    some = triggered_test_set(images, Trigger(pattern, trigger.mask, 1.0, torch.tensor([0]), torch.arange(0)))
    assert torch.equal(some.images[:, 0, 0, 0], pattern[images.labels != 0, 0, 0, 0])


def test_trigger_that_does_not_fit(images):
    for shape, message in [((3, 32, 32, 1), "3 entries"), ((1, 28, 28, 1), "28x28"), ((1, 32, 32, 2), "32x32x2")]:
        mask = torch.ones(*shape[:3], 1).double()
        trigger = Trigger(torch.zeros(shape, dtype=torch.uint8), mask, 1.0, torch.tensor([0]), torch.arange(0))
        with pytest.raises(InputError, match=message):
            triggered_test_set(images, trigger)


# ---- attacks


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack and not attack.needs_folder])
def test_dirty_label_attacks(name, images):
    index = torch.arange(50, 500)
    original = images.images.clone()
    poisoned = ATTACKS[name].poison(images, index, config(rate=0.1, target=2))
    chosen = poisoned.trigger.data_index
    assert len(chosen) == int(0.1 * 405) and (images.labels[chosen] != 2).all() and (chosen >= 50).all()
    assert torch.equal(images.images, original), "the dataset itself must not change"
    changed = torch.isin(index, chosen)
    assert (poisoned.train.labels[changed] == 2).all()
    assert torch.equal(poisoned.train.images[changed], poisoned.trigger.stamp(images.images[index[changed]]))
    assert torch.equal(poisoned.train.images[~changed], images.images[index[~changed]])
    assert torch.equal(poisoned.train.labels[~changed], images.labels[index[~changed]])
    again = ATTACKS[name].poison(images, index, config(rate=0.1, target=2))
    assert torch.equal(again.train.images, poisoned.train.images)
    other = ATTACKS[name].poison(images, index, config(rate=0.1, target=2, seed=1))
    assert not torch.equal(other.trigger.data_index, chosen)
    assert torch.equal(other.trigger.pattern, poisoned.trigger.pattern)


def test_poison_rate_counts_non_target_images(images):
    assert len(ATTACKS["badnets"].poison(images, torch.arange(500), config()).trigger.data_index) == 22  # 5 % of 450
    with pytest.raises(InputError, match="--poison-rate"):
        ATTACKS["badnets"].poison(images, torch.arange(500), config(rate=0.001))


def test_blend_noise_is_stored_and_blended(images):
    trigger = ATTACKS["blend"].poison(images, torch.arange(500), config(alpha=0.2)).trigger
    assert trigger.pattern.shape == (1, 32, 32, 3) and trigger.mask.all() and trigger.alpha == 0.2
    assert 100 < trigger.pattern.float().mean() < 155 and trigger.pattern.float().std() > 60


def clean_label_folder(folder, images):
    changed = images.images.clone()
    changed[images.labels == 0] = 7
    np.save(folder / "train_images.npy", changed.numpy())
    np.save(folder / "train_labels.npy", images.labels.numpy())
    return changed


def test_clean_label_reads_a_published_set(tmp_path, images):
    changed = clean_label_folder(tmp_path, images)
    index = torch.arange(499, 49, -1)  # some order of the attacker's images
    poisoned = ATTACKS["clean-label"].poison(images, index, config(folder=str(tmp_path)))
    assert torch.equal(poisoned.train.images, changed[index])
    assert torch.equal(poisoned.train.labels, images.labels[index])
    assert set(poisoned.trigger.data_index.tolist()) == set(index[images.labels[index] == 0].tolist())


def test_clean_label_bad_folders(tmp_path, images):
    def poison():
        return ATTACKS["clean-label"].poison(images, torch.arange(500), config(folder=str(tmp_path)))

    with pytest.raises(InputError, match="No such file"):
        poison()
    clean_label_folder(tmp_path, images)
    with pytest.raises(InputError, match=r"classes \[0\], expected --poison-target 4"):
        ATTACKS["clean-label"].poison(images, torch.arange(500), config(folder=str(tmp_path), target=4))
    np.save(tmp_path / "train_labels.npy", images.labels.numpy()[::-1])
    with pytest.raises(InputError, match="keeps the dataset's labels"):
        poison()
    np.save(tmp_path / "train_images.npy", images.images.numpy()[:7])
    with pytest.raises(InputError, match=r"expected one array of whole numbers of shape \(500, 32, 32, 3\)"):
        poison()
    np.save(tmp_path / "train_images.npy", images.images.numpy().astype(">i8") + 256)
    with pytest.raises(InputError, match="expected 0 to 255"):
        poison()
    np.save(tmp_path / "train_images.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="pickle"):
        poison()


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
        load_cifar10(tmp_path)
    assert "no route to host" in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cut off")
    with pytest.raises(InputError, match="no intact CIFAR-10"):
        load_cifar10(tmp_path)
