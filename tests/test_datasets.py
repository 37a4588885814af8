"""Every dataset of the registry from tiny files in its own layout, and anybody's folders of pictures."""

import dataclasses
import hashlib
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import io
from torchvision.datasets import GTSRB, SVHN, ImageFolder

import evaluate_cifar as evaluate
import optimize_mask_cifar as optimize
import prune_neuron_cifar as prune
import train_backdoor_cifar as train
from attacks import ATTACKS
from benchmarks import speed
from data import published
from data.augment import make_transform
from data.datasets import DATASETS, DataConfig, Normalization, load_dataset, measure_normalization
from data.image_folder import MOST_CLASSES
from data.pictures import open_picture
from formats.cards import read_card
from tests.conftest import WIDTH
from utils import machine
from utils.errors import InputError
from utils.seeding import seeded_generator

NAMES = list(DATASETS)  # before the tests add theirs
TRAIN, TEST = 12, 5  # images of each published set
LAYOUTS = {}


def layout(name, classes, size=32, flip=True):
    """Register a function that writes a tiny dataset; the first label, and whether it may be mirrored."""

    def register(make):
        LAYOUTS[name] = (make, classes, size, flip)
        return make

    return register


def pixels(count, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def cifar(folder, files, patch, contents):
    """Write pickles as they are published, and let their checksums be the published ones."""
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    patch.setattr(published, files, {name: md5(folder / name) for name in contents})


def batch(count, seed, key, classes):
    planes = pixels(count, seed=seed).transpose(0, 3, 1, 2).reshape(count, -1)
    return {"data": planes, key: [(label + 1) % classes for label in range(count)]}


@layout("cifar10", 10)
def write_cifar10(root, patch):
    counts = {"data_batch_1": TRAIN // 2, "data_batch_2": TRAIN // 2, "test_batch": TEST}
    contents = {name: batch(count, seed, "labels", 10) for seed, (name, count) in enumerate(counts.items())}
    cifar(root / published.CIFAR10_FOLDER, "CIFAR10_FILES", patch, contents)


@layout("cifar100", 100)
def write_cifar100(root, patch):
    counts = {"train": TRAIN, "test": TEST}
    contents = {name: batch(count, seed, "fine_labels", 100) for seed, (name, count) in enumerate(counts.items())}
    meta = {"meta": {"fine_label_names": [f"class {label}" for label in range(100)]}}
    cifar(root / published.CIFAR100_FOLDER, "CIFAR100_FILES", patch, meta | contents)


@layout("svhn", 10, flip=False)
def write_svhn(root, patch):
    root.mkdir(parents=True)
    splits = {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        path = root / f"{split}_32x32.mat"
        labels = [1, 10, *([5] * (count - 2))]  # the digit 0 has the label 10
        io.savemat(path, {"X": pixels(count).transpose(1, 2, 3, 0), "y": np.array(labels)[:, None]})
        splits[split] = ["", path.name, md5(path)]
    patch.setattr(SVHN, "split_list", splits)


def write_signs(training, root, patch):
    base = root / "gtsrb"
    for label in range(43):
        folder = base / "GTSRB" / training / f"{label:05d}"
        folder.mkdir(parents=True)
        (folder / f"GT-{label:05d}.csv").write_text("Filename;ClassId\n")  # lies there
        Image.fromarray(pixels(1, 20 + label)[0]).save(folder / "00000_00000.ppm")
    images = base / "GTSRB" / "Final_Test" / "Images"
    images.mkdir(parents=True)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number in range(TEST):
        Image.fromarray(pixels(1, 50, number)[0]).save(images / f"{number:05d}.ppm")
        rows.append(f"{number:05d}.ppm;50;50;5;5;45;45;{(number + 1) % 43}")
    (base / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
    patch.setattr(published, "GTSRB_TRAINING", {**published.GTSRB_TRAINING, training: 43})
    patch.setattr(published, "GTSRB_TEST", TEST)


@layout("gtsrb", 43, flip=False)
def write_gtsrb(root, patch):
    write_signs("Final_Training/Images", root, patch)


@layout("tiny-imagenet-200", 3, size=64)
def write_tiny_imagenet(root, patch):
    folder, wnids = root / "tiny-imagenet-200", ["n01", "n02", "n03"]
    for label, wnid in enumerate(wnids):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for number in range(TRAIN // 3):
            picture = Image.fromarray(pixels(1, 64, number)[0]).convert("L" if label else "RGB")  # some are grey
            picture.save(folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG")
    (folder / "val" / "images").mkdir(parents=True)
    rows = []
    for number in range(TEST):
        Image.fromarray(pixels(1, 64, number)[0]).save(folder / "val" / "images" / f"val_{number}.JPEG")
        rows.append(f"val_{number}.JPEG\t{wnids[(number + 1) % 3]}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tbullfrog\nn09\tother\n")
    patch.setattr(published, "TINY_IMAGENET_COUNTS", (3, TRAIN, TEST))


@layout("synthetic", 10)
def write_nothing(root, patch):
    patch.setattr("data.datasets.SYNTHETIC_SIZES", {"train": TRAIN, "test": TEST})


@pytest.fixture(params=NAMES)
def written(request, tmp_path, monkeypatch):
    """The name of a dataset, its folder and what is known of it; the network is out of reach."""
    make, *known = LAYOUTS[request.param]
    offline(monkeypatch)
    make(tmp_path / "data", monkeypatch)
    return request.param, tmp_path / "data", known


def offline(patch):
    def fail(*args, **kwargs):
        raise OSError("<urlopen error\nno route to host>")

    for place in ("cifar.download_and_extract_archive", "svhn.download_url"):
        patch.setattr(f"torchvision.datasets.{place}", fail)
    patch.setattr("torchvision.datasets.utils.download_and_extract_archive", fail)


# ---- published datasets


def test_every_dataset_has_a_layout_here():
    assert set(LAYOUTS) == set(NAMES)


def test_a_dataset_is_read_from_its_own_layout(written):
    name, root, (classes, size, flip) = written
    dataset = load_dataset(name, root)
    assert (dataset.name, dataset.flip, dataset.sha256) == (name, flip, None)
    assert len(dataset.classes) == len(set(dataset.classes)) == dataset.num_classes == classes
    for part in (dataset.train, dataset.test):
        assert part.images.dtype == torch.uint8 and part.images.shape[1:] == (size, size, 3)
        assert part.labels.dtype == torch.int64 and part.num_classes == classes
        assert part.labels.min() >= 0 and part.labels.max() < classes
    assert all(0 < value < 1 for value in (*dataset.normalization.mean, *dataset.normalization.std))
    again = load_dataset(name, root)
    assert torch.equal(dataset.train.images, again.train.images) and torch.equal(dataset.test.labels, again.test.labels)


def test_mirrored_digits_and_signs_are_others(written):
    """An image that rises to the right never falls to the right after the augmentation of such a set."""
    name, root, (_, size, flip) = written
    dataset = load_dataset(name, root)
    ramp = torch.arange(1, size + 1, dtype=torch.uint8)[None, None, :, None].expand(64, size, size, 3)
    moved = make_transform(dataset.normalization, dataset.flip)(ramp, seeded_generator(1))
    assert (moved[:, 0, size // 2, 8:-8].diff(dim=1) < 0).any() == flip == (name not in ("svhn", "gtsrb"))


def test_labels_and_pixels_are_those_of_the_files(written):
    name, root, (classes, *_) = written
    dataset = load_dataset(name, root)
    first, labels = dataset.train.images[0].numpy(), dataset.train.labels.tolist()
    if name.startswith("cifar"):
        assert np.array_equal(first, pixels(TRAIN)[0]) or name == "cifar10"
        assert labels == [(place + 1) % classes for part in split(name) for place in range(part)]
    elif name == "svhn":
        assert np.array_equal(dataset.train.images.numpy(), pixels(TRAIN)) and labels == [1, 0, *[5] * (TRAIN - 2)]
    elif name == "gtsrb":
        assert labels == list(range(43)) and dataset.test.labels.tolist() == list(range(1, TEST + 1))
    elif name == "tiny-imagenet-200":
        assert labels == [0] * 4 + [1] * 4 + [2] * 4 and dataset.test.labels.tolist() == [1, 2, 0, 1, 2]
        assert dataset.classes == ("goldfish", "bullfrog", "n03")
        assert (dataset.train.images[4:] == dataset.train.images[4:, :, :, :1]).all(), "grey pictures become RGB"
        assert not (dataset.train.images[:4] == dataset.train.images[:4, :, :, :1]).all()
    else:
        assert len(labels) == TRAIN


def test_nothing_of_another_checksum_is_unpickled(tmp_path, monkeypatch):
    """A pickle can run code."""
    offline(monkeypatch)
    write_cifar10(tmp_path, monkeypatch)
    monkeypatch.setattr(published.pickle, "loads", lambda *args, **kwargs: pytest.fail("unpickled"))
    batch = tmp_path / published.CIFAR10_FOLDER / "test_batch"
    batch.write_bytes(batch.read_bytes() + b".")
    with pytest.raises(InputError, match="no intact CIFAR-10"):
        load_dataset("cifar10", tmp_path)


def split(name):
    return (TRAIN // 2, TRAIN // 2) if name == "cifar10" else (TRAIN,)


def test_signs_are_torchvisions_resized_to_32(tmp_path, monkeypatch, capsys):
    """In the layout that torchvision downloads, too, which has fewer training images."""
    from torchvision.transforms import Resize

    write_signs("Training", tmp_path, monkeypatch)
    dataset = load_dataset("gtsrb", tmp_path)
    assert "Training: 43 training images; the benchmark's 39209 are in" in capsys.readouterr().out
    for split, part in (("train", dataset.train), ("test", dataset.test)):
        theirs = GTSRB(tmp_path, split, transform=Resize((32, 32)))
        assert [label for _, label in theirs] == part.labels.tolist()
        assert all(np.array_equal(image, ours) for (image, _), ours in zip(theirs, part.images.numpy(), strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "synthetic"])
def test_a_dataset_that_is_not_there(name, tmp_path, monkeypatch):
    offline(monkeypatch)
    with pytest.raises(InputError) as caught:
        load_dataset(name, tmp_path / "nowhere")
    message = str(caught.value)
    assert "download failed (<urlopen error no route to host>)" in message and "\\n" not in message
    assert str(tmp_path / "nowhere") in message and "--data-dir" in message and "://" in message


def test_a_damaged_dataset_is_no_dataset(written):
    """A pickle is never read whose checksum is not the published one; other files are named."""
    name, root, _ = written
    if name == "synthetic":
        return
    files = sorted(path for path in root.rglob("*") if path.suffix in (".mat", ".ppm", ".JPEG") or "ba" in path.name)
    files += sorted(root.rglob("train"))
    victim = next(path for path in files if path.is_file())
    victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"no intact|not a readable picture"):
        load_dataset(name, root)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("gtsrb", lambda root: next(root.rglob("00007/*.ppm")).unlink(), "00007: no picture in it"),
        ("gtsrb", lambda root: shutil.copy(*[next(root.rglob("00007/*.ppm"))] , next(root.rglob("00007")) / "b.ppm"), "44 images, expected 43"),  # noqa: E501
        ("gtsrb", lambda root: shutil.rmtree(next(root.rglob("00042"))), "00042: cannot be read as a folder"),
        ("gtsrb", lambda root: edit(root, "GT-final_test.csv", ";1\n", ";43\n"), "outside 0..42"),
        ("gtsrb", lambda root: edit(root, "GT-final_test.csv", "00000.ppm", "../../a.ppm"), "no name of a file"),
        ("gtsrb", lambda root: edit(root, "GT-final_test.csv", "ClassId", "Class"), "expected the table"),
        ("gtsrb", lambda root: edit(root, "GT-final_test.csv", ";1\n", ";one\n"), "expected the table"),
        ("tiny-imagenet-200", lambda root: edit(root, "val_annotations.txt", "n02", "n77"), "one of the 3 classes"),
        ("tiny-imagenet-200", lambda root: edit(root, "val_annotations.txt", "val_0", "../val_0"), "no name of a file"),
        ("tiny-imagenet-200", lambda root: shutil.rmtree(next(root.rglob("n03"))), "2 classes, expected 3"),
        ("tiny-imagenet-200", lambda root: next(root.rglob("n01_0.JPEG")).unlink(), "11 images, expected 12"),
        ("tiny-imagenet-200", lambda root: Image.new("RGB", (32, 32)).save(next(root.rglob("n01_0.JPEG"))),
         "32x32 pixels, expected 64x64"),
    ],
)  # fmt: skip
def test_files_that_do_not_belong_together(name, damage, message, tmp_path, monkeypatch):
    offline(monkeypatch)
    LAYOUTS[name][0](tmp_path, monkeypatch)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        load_dataset(name, tmp_path)


def edit(root, name, old, new):
    path = next(root.rglob(name))
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def test_archives_are_fetched_with_their_checksums(tmp_path, monkeypatch):
    fetched = []

    def fetch(url, folder, md5):
        fetched.append((url.rpartition("/")[2], folder, len(md5)))
        if url.endswith("GT.zip"):
            write_gtsrb(tmp_path, monkeypatch)

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", fetch)
    assert len(load_dataset("gtsrb", tmp_path).train) == 43
    place = str(tmp_path / "gtsrb")
    assert fetched == [(f"GTSRB_Final_{part}.zip", place, 32) for part in ("Training_Images", "Test_Images", "Test_GT")]


# ---- names


@pytest.mark.parametrize(
    ("name", "hint"),
    [("cifar", "did you mean cifar10"), ("CIFAR100", "did you mean cifar100"), ("folder:", "folder:PATH"), ("", "")],
)
@pytest.mark.parametrize("script", [train, optimize, prune, evaluate, speed])
def test_unknown_names_are_answered_with_those_known(script, name, hint, capsys):
    with pytest.raises(SystemExit) as caught:
        script.build_parser().parse_args(["--dataset", name])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert hint in error and all(known in error for known in (*NAMES, "folder:PATH"))
    with pytest.raises(ValueError, match="choose from cifar10"):
        DataConfig(name)
    with pytest.raises(InputError, match="choose from cifar10"):
        load_dataset(name, "unused")


# ---- folders of pictures


def write_folder(root, size=(64, 64), train=10, test=3, classes=("cat", "dog", "owl"), seed=0):
    """Write pictures whose mean colour tells the class: (width, height)."""
    rng = np.random.default_rng(seed)
    for part, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                picture = rng.integers(0, 100, (size[1], size[0], 3), dtype=np.uint8)
                picture[..., label % 3] += 100
                Image.fromarray(picture).save(root / part / name / f"{number:03d}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "mine", (24, 20))


def test_a_folder_is_read_as_torchvision_reads_it(folder, capsys):
    (folder / "train" / "cat" / ".hidden").write_text("")
    (folder / ".git").mkdir()
    dataset = load_dataset(f"folder:{folder}", "unused")
    assert dataset.classes == ("cat", "dog", "owl") and dataset.name == f"folder:{folder}" and not dataset.flip
    for name, part in (("train", dataset.train), ("test", dataset.test)):
        theirs = ImageFolder(folder / name)
        assert [label for _, label in theirs.samples] == part.labels.tolist()
        images = np.stack([np.array(image) for image, _ in theirs])
        assert np.array_equal(part.images.numpy(), images) and images.shape[1:] == (20, 24, 3)
    scaled = dataset.train.images.double() / 255
    expected = [tuple(scaled.flatten(0, 2).std(0, correction=0).tolist()), tuple(scaled.mean((0, 1, 2)).tolist())]
    for found, value in zip((dataset.normalization.std, dataset.normalization.mean), expected, strict=True):
        assert found == pytest.approx(value, abs=5.1e-5)
    printed = capsys.readouterr().out
    assert f"reading the pictures of {folder}\n" in printed and "30 training and 9 test images of 3 classes" in printed
    assert "left out" not in printed


def test_the_validation_set_is_the_test_set_where_there_is_none(folder):
    whole = load_dataset(f"folder:{folder}", "")
    (folder / "test").rename(folder / "val")
    assert torch.equal(load_dataset(f"folder:{folder}", "").test.images, whole.test.images)


def test_pictures_of_any_kind_become_rgb(folder, capsys):
    """Grey, palette, transparent and JPEG; what is no picture is said to be left out."""
    cat, dog = folder / "train" / "cat", folder / "train" / "dog"
    colour = Image.open(cat / "000.png").copy()
    palette = colour.convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(cat / "001.png", transparency=bytes(range(256)))
    grey = colour.convert("L")
    grey.save(cat / "002.png")
    grey.save(cat / "003.pgm")
    colour.convert("RGBA").save(cat / "004.png")
    colour.save(cat / "005.JPG", quality=95)
    colour.convert("1").save(cat / "006.png")
    (cat / "003.png").unlink(), (cat / "005.png").unlink()
    (dog / "notes.txt").write_text("no picture")
    (dog / "sub").mkdir()
    images = load_dataset(f"folder:{folder}", "").train.images
    assert (images[1].int() - images[0].int()).abs().float().mean() < 20, "a palette's transparency is dropped"
    assert torch.equal(images[2], images[3]) and (images[2] == images[2, :, :, :1]).all()
    assert torch.equal(images[4], images[0]) and (images[5].int() - images[0].int()).abs().float().mean() < 40
    assert set(images[6].unique().tolist()) <= {0, 255}
    assert f"left out as no pictures: 2 files or folders, such as {dog / 'sub'}\n" in capsys.readouterr().out


def test_pictures_of_many_sizes_are_cropped_and_resized(folder):
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 255  # the middle is all that a crop leaves
    Image.fromarray(wide).save(folder / "train" / "cat" / "000.png")
    with pytest.raises(InputError, match=r"001.png: 24x20 pixels, but .*000.png has 120x40; --image-size N"):
        load_dataset(f"folder:{folder}", "")
    dataset = load_dataset(f"folder:{folder}", "", image_size=32)
    assert dataset.train.images.shape == (30, 32, 32, 3) and dataset.image_size == 32
    assert dataset.train.images[0].min() > 200


def test_an_image_size_is_for_folders():
    with pytest.raises(InputError, match="--image-size 32 has no effect with --dataset synthetic"):
        load_dataset("synthetic", "", image_size=32)


def test_the_content_of_a_folder_is_known_again(folder, tmp_path):
    first = load_dataset(f"folder:{folder}", "")
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    assert load_dataset(f"folder:{elsewhere}", "").sha256 == first.sha256
    Image.new("RGB", (24, 20)).save(elsewhere / "test" / "cat" / "000.png")
    assert load_dataset(f"folder:{elsewhere}", "").sha256 != first.sha256
    moved = shutil.copytree(folder, tmp_path / "renamed")
    for part in ("train", "test"):
        (moved / part / "cat").rename(moved / part / "bat")
    assert load_dataset(f"folder:{moved}", "").sha256 != first.sha256


def test_constants_are_counted_exactly():
    black = torch.zeros(5, 16, 16, 3, dtype=torch.uint8)
    assert measure_normalization(black) == Normalization((0, 0, 0), (0.0039, 0.0039, 0.0039))
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(2, 16, 16, 3)
    assert measure_normalization(images) == Normalization((0.5,) * 3, (0.2898,) * 3)


BAD_FOLDERS = {}


def bad(message):
    """Register what can be wrong with a folder under its function's name."""

    def register(damage):
        BAD_FOLDERS[damage.__name__] = (damage, message)
        return damage

    return register


@bad("mine: no such folder; --dataset folder:PATH")
def not_there(folder):
    shutil.rmtree(folder)


@bad("mine: no such folder")
def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


@bad(r"expected the folders train and test \(or val\)")
def no_test(folder):
    shutil.rmtree(folder / "test")


@bad("train: 1 folders, expected one for each of 2")
def one_class(folder):
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "cat"), shutil.rmtree(folder / part / "dog")


@bad("train: 1004 folders")
def too_many_classes(folder):
    for number in range(MOST_CLASSES + 1):
        (folder / "train" / str(number)).mkdir()


@bad("the class 'emu' is only in one of train, test")
def another_class(folder):
    (folder / "test" / "dog").rename(folder / "test" / "emu")
    (folder / "train" / "dog").rename(folder / "train" / "eel")
    shutil.copytree(folder / "train" / "eel", folder / "test" / "eel")


@bad("dog: no picture in it; expected files that end in .png")
def an_empty_class(folder):
    shutil.rmtree(folder / "test" / "dog")
    (folder / "test" / "dog").mkdir()


@bad("dog/003.png: not a readable picture")
def a_text(folder):
    (folder / "train" / "dog" / "003.png").write_text("a text")


@bad("dog/003.png: not a readable picture")
def an_empty_file(folder):
    (folder / "train" / "dog" / "003.png").write_bytes(b"")


@bad("dog/003.jpg: not a readable picture .*truncated")
def a_truncated_jpeg(folder):
    path = folder / "train" / "dog" / "003.jpg"
    Image.fromarray(pixels(1, 64)[0][:20, :24]).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:700])


@bad(r"dog/003.png: not a readable picture \(Image size \(196000000 pixels\) exceeds")
def a_bomb(folder):
    Image.new("1", (14000, 14000)).save(folder / "train" / "dog" / "003.png")


@bad(r"dog/003.png: not a readable picture \(Image size \(100000000 pixels\) exceeds")
def a_picture_of_which_pillow_only_warns(folder):
    Image.new("1", (10000, 10000)).save(folder / "train" / "dog" / "003.png")


@bad("dog/003.png: not a readable picture")
def postscript_that_another_program_would_open(folder):
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 20\n%%EndComments\nshowpage\n"
    (folder / "train" / "dog" / "003.png").write_text(text)


@bad("dog/003.png: pixels of the kind I;16")
def sixteen_bits(folder):
    Image.fromarray(np.zeros((20, 24), np.uint16)).save(folder / "train" / "dog" / "003.png")


@bad("dog/003.png: is a pipe")
def a_pipe(folder):
    import os

    (folder / "train" / "dog" / "003.png").unlink()
    os.mkfifo(folder / "train" / "dog" / "003.png")


@bad("train/loop: no picture in it")
def a_link_to_its_own_folder(folder):
    (folder / "train" / "loop").symlink_to("..")
    (folder / "test" / "loop").symlink_to("..")


@bad("loop: cannot be read as a folder")
def a_link_to_itself(folder):
    (folder / "train" / "loop").symlink_to("loop")


@bad("003.png: no such file")
def a_link_that_leads_nowhere(folder):
    (folder / "train" / "dog" / "003.png").unlink()
    (folder / "train" / "dog" / "003.png").symlink_to("nowhere")


@bad(r"'ca\\nt' is no printable name")
def a_name_with_a_line_end(folder):
    for part in ("train", "test"):
        (folder / part / "cat").rename(folder / part / "ca\nt")


@bad("6 pictures, expected 10 or more")
def few_pictures(folder):
    shutil.rmtree(folder)
    write_folder(folder, (24, 20), train=2)


@bad("8x20 pixels, too small; --image-size 16 enlarges all")
def small_pictures(folder):
    shutil.rmtree(folder)
    write_folder(folder, (8, 20))


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders_end_in_one_line(name, folder, tmp_path, capsys):
    damage, message = BAD_FOLDERS[name]
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_dataset(f"folder:{folder}", "")
    flags = ["--dataset", f"folder:{folder}", *WIDTH, "--epoch", "1", "--output-dir", str(tmp_path / "out")]
    assert train.main(flags) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "internal" not in error
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock"}, "nothing is half-written"


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
def test_paths_that_can_be_none(path, tmp_path, capsys):
    assert train.main(["--dataset", f"folder:{path}", *WIDTH, "--output-dir", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "internal" not in error


def test_memory_is_counted_before_a_picture_is_decoded(folder, monkeypatch):
    (folder / "train" / "dog" / "003.png").write_text("would be found if it were read")
    monkeypatch.setattr(machine, "free_memory", lambda: 39 * 24 * 20 * 3 - 1)
    with pytest.raises(InputError, match=r"39 pictures of 24x20 pixels, the first of them .*cat/000.png, needs about"):
        load_dataset(f"folder:{folder}", "")
    monkeypatch.setattr(machine, "free_memory", lambda: 39 * 24 * 20 * 3)
    with pytest.raises(InputError, match=r"003.png: not a readable"):
        load_dataset(f"folder:{folder}", "")


def test_a_picture_of_another_size_is_not_decoded(folder, monkeypatch):
    Image.new("1", (9000, 9000)).save(folder / "train" / "cat" / "001.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    with open_picture(folder / "train" / "cat" / "001.png") as picture:
        assert picture.size == (9000, 9000)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"001.png: 9000x9000 pixels, but"):
        load_dataset(f"folder:{folder}", "")


# ---- the steps on a folder of pictures


def run(script, out, *flags):
    return script.main(["--output-dir", str(out), "--threads", "1", "--precision", "fp32", *map(str, flags)])


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """All three steps on pictures that are not square: the folder of the pictures and that of the run."""
    place = tmp_path_factory.mktemp("steps")
    mine, out = write_folder(place / "mine", (48, 40), train=20), place / "out"
    network = ["--checkpoint", out / "last_model.th", "--trigger-info", out / "trigger_info.th", "--val-frac", "0.1"]
    first = ["--dataset", f"folder:{mine}", "--widen-factor", "0.0625", "--epoch", 1, "--poison-rate", "0.5"]
    assert run(train, out, *first) == 0
    assert run(optimize, out, *network, "--nb-iter", 2, "--print-every", 2, "--batch-size", 4) == 0
    assert run(prune, out, *network, "--mask-file", out / "mask_values.txt", "--pruning-max", "0.1") == 0
    return mine, out


@pytest.fixture
def moved(steps, tmp_path):
    """Copies of both, with the pictures elsewhere than where the card says."""
    mine, out = (shutil.copytree(path, tmp_path / path.name) for path in steps)
    for name in ("last_model", "repaired_model"):
        path = out / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "dataset": f"folder:{tmp_path / 'gone'}"}))
    return mine, out


def test_the_card_says_what_the_pictures_were(steps):
    mine, out = steps
    dataset = load_dataset(f"folder:{mine}", "")
    for name in ("model_init.th", "last_model.th", "repaired_model.th"):
        card = read_card(out / name)
        assert card["dataset"] == f"folder:{mine}" and card["num_classes"] == 3 and card["image_size"] is None
        assert card["classes"] == ["cat", "dog", "owl"] and card["dataset_sha256"] == dataset.sha256
        assert card["normalization"] == {name: list(part) for name, part in vars(dataset.normalization).items()}
    trigger = torch.load(out / "trigger_info.th")
    assert trigger["trigger_mask"].shape == (1, 40, 48, 1) and trigger["trigger_mask"][0, -3:, -3:].all()
    assert trigger["trigger_mask"].sum() == 9, "the patch is bottom right"


def test_the_folder_that_is_read_is_printed(steps, capsys):
    mine, out = steps
    assert evaluate.main(["--checkpoint", str(out / "repaired_model.th"), "--threads", "1"]) == 0
    assert f"reading the pictures of {mine}\n" in capsys.readouterr().out


def test_a_folder_may_lie_elsewhere(moved, capsys):
    mine, out = moved
    network = ["--checkpoint", str(out / "repaired_model.th"), "--trigger-info", str(out / "trigger_info.th")]
    assert evaluate.main([*network, "--threads", "1"]) == 1
    assert "gone: no such folder; --dataset folder:PATH says where" in capsys.readouterr().err
    assert evaluate.main([*network, "--threads", "1", "--dataset", f"folder:{mine}"]) == 0
    assert "warning" not in capsys.readouterr().out
    assert evaluate.main([*network, "--threads", "1", "--dataset", "synthetic"]) == 1
    assert "contradicts the card" in capsys.readouterr().err


def test_a_folder_of_other_pictures(moved, capsys):
    mine, out = moved
    flags = ["--checkpoint", str(out / "repaired_model.th"), "--threads", "1", "--dataset", f"folder:{mine}"]
    Image.new("RGB", (48, 40)).save(mine / "test" / "cat" / "000.png")
    assert evaluate.main(flags) == 0
    assert "holds other images than when it was trained" in capsys.readouterr().out
    for part in ("train", "test"):
        (mine / part / "cat").rename(mine / part / "ape")
    assert evaluate.main(flags) == 1
    assert "its card names other classes" in capsys.readouterr().err
    for part in ("train", "test"):
        shutil.copytree(mine / part / "ape", mine / part / "bat")
    assert evaluate.main(flags) == 1
    assert "3 classes, but folder:" in capsys.readouterr().err


def test_a_run_is_not_resumed_on_other_pictures(steps, tmp_path, capsys, monkeypatch):
    from tests.small import interrupt_after

    mine, out = shutil.copytree(steps[0], tmp_path / "mine"), tmp_path / "out"
    flags = ["--dataset", f"folder:{mine}", "--widen-factor", "0.0625", "--epoch", 1, "--batch-size", 20]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        assert run(train, out, *flags, "--poison-rate", "0.5") == 130
    kept = (mine / "train" / "cat" / "000.png").read_bytes()
    Image.new("RGB", (48, 40)).save(mine / "train" / "cat" / "000.png")
    capsys.readouterr()
    assert run(train, out, *flags, "--poison-rate", "0.5", "--resume") == 1
    assert "dataset is" in capsys.readouterr().err
    (mine / "train" / "cat" / "000.png").write_bytes(kept)
    assert run(train, out, *flags, "--poison-rate", "0.5", "--resume") == 0


def test_the_image_size_comes_from_the_card(tmp_path, capsys):
    mine = write_folder(tmp_path / "mine", (40, 20))
    flags = ["--dataset", f"folder:{mine}", "--image-size", "32", "--widen-factor", "0.0625", "--epoch", 1]
    assert run(train, tmp_path / "out", *flags, "--poison-rate", "0.5") == 0
    network = ["--checkpoint", str(tmp_path / "out" / "last_model.th"), "--threads", "1"]
    capsys.readouterr()
    assert evaluate.main(network) == 0 and "32x32 pixels" in capsys.readouterr().out
    assert evaluate.main([*network, "--image-size", "40"]) == 1
    assert "--image-size 40 contradicts the card" in capsys.readouterr().err


# ---- attacks and networks on other images


def attack_flags(name, place, mine):
    if name == "folder":
        exported = place / "set"
        common = ["--dataset", f"folder:{mine}", "--widen-factor", "0.0625", "--epoch", 1]
        assert run(train, place / "sig", *common, "--poison-type", "sig", "--export-poisoned", exported) == 0
        return ["--poisoned-dir", exported]
    if name == "clean-label":
        common = ["--dataset", f"folder:{mine}", "--widen-factor", "0.0625", "--epoch", 1]
        assert run(train, place / "benign", *common, "--poison-type", "benign") == 0
        return ["--clb-surrogate", place / "benign" / "last_model.th", "--clb-steps", 1]
    return ["--poison-rate", "0.5"] if name in ("badnets", "blend", "sig") else []


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("size", [(48, 48), (40, 24)], ids=["48x48", "40x24"])
def test_every_attack_on_other_images(name, size, tmp_path, capsys):
    """Two classes only; the input-aware attacks refuse pictures that are not square."""
    mine = write_folder(tmp_path / "mine", size, train=12, test=2, classes=("no", "yes $_$ 日本"))
    epochs = 2 if name.startswith("iab") else 1
    flags = ["--dataset", f"folder:{mine}", "--widen-factor", "0.0625", "--epoch", epochs, "--poison-type", name]
    status = run(train, tmp_path / "out", *flags, *attack_flags(name, tmp_path, mine))
    printed = capsys.readouterr()
    if name.startswith("iab") and size[0] != size[1]:
        assert status == 1 and "multiples of 8, not 24x40" in printed.err
        return
    assert status == 0, printed.err
    assert not printed.err, "no warnings about names"
    if name != "benign":
        trigger = torch.load(tmp_path / "out" / "trigger_info.th")
        assert trigger["trigger_mask"].shape[1:] == (size[1], size[0], 1)
        assert (tmp_path / "out" / "clean_and_triggered.png").exists()


@pytest.mark.parametrize("arch", ["vgg19_bn", "resnet18", "MobileNetV2"])
def test_networks_on_small_pictures(arch, tmp_path, capsys):
    mine = write_folder(tmp_path / "mine", (16, 17), train=11)
    flags = ["--dataset", f"folder:{mine}", "--widen-factor", "0.0625", "--arch", arch, "--poison-rate", "0.5"]
    status = run(train, tmp_path / "out", *flags, "--epoch", 1, "--batch-size", 28)  # the last batch is one image
    error = capsys.readouterr().err
    if arch == "vgg19_bn":
        assert status == 1 and "--arch vgg19_bn: the network fails on images of 17x16" in error
        assert error.count("\n") == 1
    else:
        assert status == 0, error


def test_an_input_aware_attack_whose_triggers_fit_into_no_file(monkeypatch, folder):
    monkeypatch.setattr("attacks.input_aware.LARGEST", {"trigger_pattern": 100})
    dataset = dataclasses.replace(load_dataset(f"folder:{folder}", ""))
    attack = ATTACKS["iab-all"]()
    with pytest.raises(InputError, match="12,960 numbers, but trigger files hold 100"):
        attack.make_loop(None, attack.poison(dataset.train), dataset, None)


def test_a_test_set_of_one_image():
    from attacks import BadNets
    from data.triggers import triggered_test_set
    from engine.evaluation import Evaluator
    from models import build_model

    test = load_dataset("synthetic", "").test[torch.tensor([0])]
    label = int(test.labels[0])
    trigger = BadNets(poison_target=(label + 1) % 10, poison_rate=1.0).poison(test).trigger
    report = Evaluator(test, trigger, Normalization((0.5,) * 3, (0.5,) * 3), torch.float32, robust=True)(
        build_model("resnet18", 10, 1 / 16)
    )
    assert report.clean.accuracy in (0, 1) and report.triggered.accuracy in (0, 1)
    own = dataclasses.replace(trigger, target=torch.tensor([label]))
    with pytest.raises(InputError, match="all 1 test images are of the trigger's target class"):
        triggered_test_set(test, own)
