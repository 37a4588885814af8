"""Triggered images from a folder: as pictures with a table, or as BackdoorBench leaves them."""

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate_cifar
import optimize_mask_cifar
from data.datasets import DATASETS
from data.triggers import triggered_test_set
from engine.evaluation import Evaluator
from formats.trigger_file import load_trigger
from formats.triggered_folder import load_triggered_folder
from utils.errors import InputError
from utils.files import save_torch
from utils.table import read_table


@pytest.fixture
def test_set():
    return DATASETS["tiny"](None).test


def write_pictures(folder, images, rows, header="file,target,label"):
    for (name, *_), image in zip(rows, images, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(folder / name)
    table = [header, *(",".join(map(str, row)) for row in rows)]
    (folder / "labels.csv").write_text("\n".join(table) + "\n")


def three(folder, test_set, **changes):
    rows = [("a/0.png", 0, 1), ("1.png", 0, 2), ("2.png", 3, 4)]
    write_pictures(folder, test_set.images[:3], rows, **changes)


def test_pictures_with_a_table(tmp_path, test_set):
    three(tmp_path, test_set)
    found = load_triggered_folder(tmp_path, test_set)
    assert torch.equal(found.images, test_set.images[:3]) and found.num_classes == 10
    assert found.labels.tolist() == [0, 0, 3] and found.true.tolist() == [1, 2, 4]
    kept = found[torch.tensor([2, 0])]
    assert kept.labels.tolist() == [3, 0] and kept.with_true_labels().labels.tolist() == [4, 1]


def test_pictures_of_the_target_class_are_left_out(tmp_path, test_set, capsys):
    write_pictures(tmp_path, test_set.images, [("0.png", 0, 0), ("1.png", 0, 2)])
    found = load_triggered_folder(tmp_path, test_set)
    assert torch.equal(found.images, test_set.images[1:2]) and found.true.tolist() == [2]
    assert "1 of 2 pictures are of their target class and left out" in capsys.readouterr().out
    write_pictures(tmp_path, test_set.images, [("0.png", 0, 0)])
    with pytest.raises(InputError, match="every picture is of its target class"):
        load_triggered_folder(tmp_path, test_set)


def test_without_true_classes_there_is_no_robust_accuracy(tmp_path, test_set, capsys):
    write_pictures(tmp_path, test_set.images, [("0.png", 0), ("1.png", 0)], header="file,target")
    found = load_triggered_folder(tmp_path, test_set)
    assert found.true is None and len(found) == 2
    assert "neither is R-Acc" in capsys.readouterr().out
    normalization = DATASETS["tiny"](None).normalization
    report = Evaluator(test_set, found, normalization, torch.float32, robust=True)(Constant(0))
    assert report.triggered.accuracy == 1 and report.robust is None and report.cross is None


class Constant(torch.nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return torch.nn.functional.one_hot(torch.full((len(x),), self.answer), 10).float()


def test_one_evaluation_for_triggers_and_folders(tmp_path, trained):
    """The pictures of a trigger, read from a folder, measure what the trigger does."""
    dataset = DATASETS["tiny"](None)
    trigger = load_trigger(trained / "trigger_info.th", 10)
    stamped = triggered_test_set(dataset.test, trigger)
    classes = torch.stack([stamped.labels, stamped.true], 1).tolist()
    rows = [(f"{number}.png", *each) for number, each in enumerate(classes)]
    write_pictures(tmp_path, stamped.images, rows)
    read = load_triggered_folder(tmp_path, dataset.test)
    evaluators = [
        Evaluator(dataset.test, each, dataset.normalization, torch.float32, robust=True) for each in (trigger, read)
    ]
    for name in ("triggered", "robust"):
        one, other = (evaluator.sets[name] for evaluator in evaluators)
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def backdoorbench(folder, test_set, entries=((4, 0, 7), (9, 0, 2))):
    kept = {}
    for index, target, label in entries:
        path = folder / f"bd_test_dataset/{label}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(test_set.images[index].numpy()).save(path)
        kept[np.int64(index)] = {"path": f"/elsewhere/{label}/{index}.png", "other_info": [target, label]}
    content = {"bd_test": {"bd_data_container": {"data_dict": kept, "save_folder_path": "/elsewhere"}}}
    save_torch(folder / "attack_result.pt", content)
    return folder / "bd_test_dataset"


def test_the_folder_of_backdoorbench(tmp_path, test_set):
    found = load_triggered_folder(backdoorbench(tmp_path, test_set), test_set)
    assert torch.equal(found.images, test_set.images[[4, 9]])
    assert found.labels.tolist() == [0, 0] and found.true.tolist() == [7, 2]


@pytest.mark.parametrize(
    ("bd_test", "message"),
    [
        (None, "its bd_test names no pictures in a folder"),
        ({"x": torch.ones(1), "y": torch.ones(1)}, "its bd_test names no pictures in a folder"),
        ({"bd_data_container": {"data_dict": {}}}, "its bd_test names no picture"),
        ({"bd_data_container": {"data_dict": {"../../x": {"other_info": [0, 1]}}}}, "index '../../x' is no class"),
        ({"bd_data_container": {"data_dict": {1: {"other_info": [0, "../.."]}}}}, "label '../..' is no class"),
        ({"bd_data_container": {"data_dict": {1: {"other_info": [10, 1]}}}}, "target 10 is no class"),
        ({"bd_data_container": {"data_dict": {1: {"other_info": [0]}}}}, "its bd_test names no pictures in a folder"),
        ({"bd_data_container": {"data_dict": {5: {"other_info": [0, 1]}}}}, "5.png: no such file"),
    ],
)
def test_results_of_backdoorbench_that_name_no_pictures(tmp_path, test_set, bd_test, message):
    folder = backdoorbench(tmp_path, test_set)
    save_torch(tmp_path / "attack_result.pt", {"bd_test": bd_test})
    with pytest.raises(InputError, match=message) as caught:
        load_triggered_folder(folder, test_set)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "expected a header with the columns file, target"),
        ("file,label\n1.png,2\n", "expected a header with the columns file, target"),
        ("file,target,target\n1.png,2,2\n", "expected a header with the columns file, target"),
        ("file,target\n", "names no picture"),
        ("file,target\n1.png\n", "more or fewer columns"),
        ("file,target\n1.png,0,3\n", "more or fewer columns"),
        ("file,target\n1.png,10\n", "target '10' is no class; there are 10, from 0 to 9"),
        ("file,target\n1.png,-1\n", "target '-1' is no class"),
        ("file,target\n1.png,cat\n", "target 'cat' is no class"),
        ("file,target\n1.png,nan\n", "target 'nan' is no class"),
        ("file,target,label\n1.png,0,\n", "label '' is no class"),
        ("file,target\n../1.png,0\n", "file '../1.png' is outside the folder"),
        ("file,target\n/etc/passwd,0\n", "file '/etc/passwd' is outside the folder"),
        ("file,target\n,0\n", "file '' is outside the folder"),
        ("file,target\nlink.png,0\n", "file 'link.png' is outside the folder"),
        ("file,target\nloop.png,0\n", "loop.png"),
        ("file,target\nnone.png,0\n", "none.png: no such file"),
        ("file,target\na,0\n", "a: is a folder"),
        ("file,target\nbroken.png,0\n", "broken.png: not a readable picture"),
        ("file,target\nlarge.png,0\n", "large.png: 33x32 pixels, but the test images have 32x32"),
        ("file,target\nbomb.png,0\n", "bomb.png"),
    ],
)
def test_tables_and_pictures_that_are_wrong(tmp_path, test_set, table, message):
    folder = tmp_path / "pictures"
    three(folder, test_set)
    Image.new("RGB", (32, 32)).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "broken.png").write_bytes((folder / "1.png").read_bytes()[:200])
    Image.new("RGB", (33, 32)).save(folder / "large.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "labels.csv").write_text(table)
    with pytest.raises(InputError, match=message) as caught:
        load_triggered_folder(folder, test_set)
    assert "\n" not in str(caught.value)


def test_a_folder_of_something_else(tmp_path, test_set):
    with pytest.raises(InputError, match=r"expected labels\.csv in it .*, or attack_result\.pt beside it"):
        load_triggered_folder(tmp_path, test_set)
    (tmp_path / "attack_result.pt").touch()
    with pytest.raises(InputError, match="none: no such folder"):
        load_triggered_folder(tmp_path / "none", test_set)


# ---- through the scripts


def given(trained, *more):
    return ["--checkpoint", f"{trained}/last_model.th", "--precision", "fp32", *more]


def test_the_scripts_measure_them(tmp_path, trained, test_set, capsys):
    folder = tmp_path / "pictures"
    three(folder, test_set)
    assert evaluate_cifar.main(given(trained, "--triggered-images", str(folder))) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "ASR " in last and "R-Acc " in last and "not known" not in last
    options = ["--val-frac", "0.1", "--nb-iter", "2", "--print-every", "2", "--batch-size", "32"]
    out = ["--output-dir", str(tmp_path / "out"), "--triggered-images", str(folder)]
    assert optimize_mask_cifar.main([*given(trained), *out, *options]) == 0
    record, rows = read_table(tmp_path / "out/optimize_log.jsonl")
    assert set(record["arguments"]["sha256"]) == {"checkpoint", "triggered_images"} and "ASR %" in rows[0]


def test_either_a_trigger_or_pictures(trained, capsys):
    with pytest.raises(SystemExit):
        evaluate_cifar.main(given(trained, "--triggered-images", "x", "--trigger-info", "y"))
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_wrong_folder_is_one_line(trained, tmp_path, capsys):
    assert evaluate_cifar.main(given(trained, "--triggered-images", str(tmp_path))) == 1
    error = capsys.readouterr().err
    assert "expected labels.csv" in error and error.count("\n") == 1
