"""What goes wrong in practice ends in one line with the right status, and takes nothing along.

One table: every case prepares a copy of a finished run of steps 1 and 2 and returns the flags that are changed; the
last of two equal flags counts. Whatever lay in the folder before has to lie there unchanged.
"""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import defenses.anp as anp
import optimize_mask_cifar as optimize
import prune_neuron_cifar as prune
import train_backdoor_cifar as train
from attacks.clean_label import IMAGES, LABELS, RECIPE
from data.datasets import ImageSet
from data.split import draw_permutation
from formats.cards import read_card
from formats.subject import Subject
from tests.conftest import WIDTH
from tests.small import interrupt_after
from utils.errors import InputError
from utils.files import sha256_of

ROOT = Path(__file__).parents[1]
MASKS = ["--val-frac", "0.1", "--nb-iter", "4", "--print-every", "2", "--batch-size", "32", "--precision", "fp32"]
TRAIN = ["--dataset", "tiny", *WIDTH, "--epoch", "1", "--precision", "fp32"]
ESCAPE = "\x1b[31m"


class Fault(NamedTuple):
    """A case: which script, how to prepare the folder and which flags to add, what the line has to say."""

    script: object
    prepare: object
    message: str


FAULTS: dict[str, Fault] = {}


def fault(script, message):
    """Register a case under its function's name."""

    def register(prepare):
        FAULTS[prepare.__name__] = Fault(script, prepare, message)
        return prepare

    return register


def base(script, folder):
    """Return flags with which the script succeeds."""
    out = ["--output-dir", f"{folder}/out"]
    if script is train:
        return [*out, *TRAIN]
    source = ["--checkpoint", f"{folder}/last_model.th", "--trigger-info", f"{folder}/trigger_info.th"]
    if script is optimize:
        return [*out, *source, *MASKS]
    sweep = ["--val-frac", "0.1", "--precision", "fp32", "--pruning-max", "0.1"]
    return [*out, *source, "--mask-file", f"{folder}/mask_values.txt", *sweep]


def contents(folder):
    return {path: sha256_of(path) for path in folder.rglob("*") if path.is_file() and "out" not in path.parts}


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "save"))


@pytest.fixture(autouse=True)
def alarm():
    """End a case that hangs."""

    def give_up(number, frame):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def one_line(text):
    """Return the one line that a script printed to stderr, and make sure that it is one, and safe to print."""
    assert text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text, text
    assert all(character.isprintable() for character in text[:-1]), text
    return text[:-1]


def edit_card(folder, **entries):
    path = folder / "last_model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return []


def edit_trigger(folder, **entries):
    content = torch.load(folder / "trigger_info.th")
    torch.save({**content, **entries}, folder / "trigger_info.th")
    return []


def replace_weight(folder, name, tensor):
    """Save another network without a card; return the flags that describe it."""
    state = torch.load(folder / "last_model.th")
    torch.save({**state, name: tensor}, folder / "other.th")
    return ["--checkpoint", f"{folder}/other.th", "--dataset", "tiny", *WIDTH]


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return str(path)


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def clean_label(folder, images, recipe=None, labels=None):
    """Make a clean-label set whose images are written by a function; return the flags that read it."""
    place = folder / "set"
    place.mkdir()
    images(place / IMAGES)
    np.save(place / LABELS, np.zeros(600, np.uint8) if labels is None else labels)
    if recipe:
        (place / RECIPE).write_text(json.dumps(recipe))
    return ["--poison-type", "clean-label", "--clb-dir", str(place)]


def pictures(folder, name, make=None):
    """Make a poisoned folder of two pictures, one of them under any name; return the flags that read it."""
    place = folder / "pictures"
    place.mkdir()
    Image.new("RGB", (32, 32)).save(place / "a.png")
    if make:
        make(place / name)
    with (place / "poisoned.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), ("a.png", 0), (name, 1)])
    return ["--poison-type", "folder", "--poisoned-dir", str(place)]


# ---- nothing is lost


@fault(optimize, "mask_values.txt is there already; choose another --output-dir or --overwrite")
def masks_are_there(folder):
    return ["--output-dir", str(folder)]


@fault(prune, "repaired_model.th is there already")
def a_repaired_network_is_there(folder):
    (folder / "repaired_model.th").write_bytes(b"hours of work")
    return ["--output-dir", str(folder)]


@fault(prune, "--checkpoint .*repaired_model.th would be overwritten")
def the_checkpoint_is_what_step_3_writes(folder):
    shutil.copy(folder / "last_model.th", folder / "repaired_model.th")
    return ["--output-dir", str(folder), "--checkpoint", f"{folder}/repaired_model.th", "--overwrite"]


@fault(prune, "--checkpoint .*link.th would be overwritten")
def the_checkpoint_is_a_link_to_what_step_3_writes(folder):
    shutil.copy(folder / "last_model.th", folder / "repaired_model.th")
    (folder / "link.th").symlink_to(folder / "repaired_model.th")
    return ["--output-dir", str(folder), "--checkpoint", f"{folder}/link.th", "--overwrite"]


@fault(prune, "--mask-file .*pruning_by_threshold.txt would be overwritten")
def the_masks_are_what_step_3_writes(folder):
    shutil.copy(folder / "mask_values.txt", folder / "pruning_by_threshold.txt")
    return ["--output-dir", str(folder), "--mask-file", f"{folder}/pruning_by_threshold.txt", "--overwrite"]


@fault(optimize, "--checkpoint .*mask_values.txt would be overwritten")
def the_checkpoint_is_what_step_2_writes(folder):
    return ["--output-dir", str(folder), "--checkpoint", f"{folder}/mask_values.txt", "--overwrite"]


@fault(optimize, "--checkpoint .*repaired_model.th would be overwritten")
def the_checkpoint_is_what_later_steps_made(folder):
    shutil.copy(folder / "last_model.th", folder / "repaired_model.th")
    return ["--output-dir", str(folder), "--checkpoint", f"{folder}/repaired_model.th", "--overwrite"]


@fault(train, "--clb-surrogate .*last_model.th would be overwritten")
def the_surrogate_is_what_step_1_writes(folder):
    surrogate = ["--clb-surrogate", f"{folder}/last_model.th"]
    return ["--output-dir", str(folder), "--poison-type", "clean-label", *surrogate, "--overwrite"]


@fault(train, "last_model.th is there already")
def a_trained_network_is_there(folder):
    return ["--output-dir", str(folder)]


@fault(prune, "--mask-file .*pruning_by_threshold.txt would be overwritten")
def the_masks_are_a_link_in_the_place_of_what_step_3_writes(folder):
    (folder / "pruning_by_threshold.txt").symlink_to("mask_values.txt")
    return ["--output-dir", str(folder), "--mask-file", f"{folder}/pruning_by_threshold.txt", "--overwrite"]


@fault(optimize, "--checkpoint .*mask_values.th would be overwritten")
def the_card_of_the_checkpoint_is_what_step_2_writes(folder):
    shutil.copy(folder / "last_model.th", folder / "mask_values.th")
    shutil.copy(folder / "last_model.json", folder / "mask_values.json")
    return ["--output-dir", str(folder), "--checkpoint", f"{folder}/mask_values.th", "--overwrite"]


@fault(optimize, "--output-dir .*file.txt: is no folder; choose another")
def a_file_as_output_folder(folder):
    return ["--output-dir", written(folder / "file.txt", "")]


@fault(train, "a complete run is here, but --seed is 5 but was 0 before; --overwrite starts again")
def resume_where_another_run_has_ended(folder):
    return ["--output-dir", str(folder), "--seed", "5", "--resume"]


# ---- files that never end, or are none


@fault(optimize, "is a pipe, a device or a socket, expected a file")
def a_pipe_as_checkpoint(folder):
    return ["--checkpoint", pipe(folder / "pipe.th")]


@fault(optimize, "last_model.json: is a pipe")
def a_pipe_as_card(folder):
    pipe(folder / "last_model.json")
    return []


@fault(optimize, "is a pipe")
def a_pipe_as_trigger(folder):
    return ["--trigger-info", pipe(folder / "pipe.th")]


@fault(optimize, "is a pipe")
def a_pipe_as_split(folder):
    return ["--split-file", pipe(folder / "pipe.txt")]


@fault(prune, "is a pipe")
def a_pipe_as_masks(folder):
    return ["--mask-file", pipe(folder / "pipe.txt")]


@fault(prune, "/dev/zero: is a pipe, a device or a socket")
def a_device_as_masks(folder):
    return ["--mask-file", "/dev/zero"]


@fault(train, "train_images.npy: is a pipe")
def a_pipe_as_array(folder):
    return clean_label(folder, pipe)


@fault(train, "b.png: is a pipe")
def a_pipe_as_picture(folder):
    return pictures(folder, "b.png", pipe)


@fault(train, "poisoned.csv: is a pipe")
def a_pipe_as_table(folder):
    flags = pictures(folder, "b.png")
    pipe(folder / "pictures" / "poisoned.csv")
    return flags


@fault(train, "recipe.json: is a pipe")
def a_pipe_as_recipe(folder):
    flags = clean_label(folder, lambda path: np.save(path, np.zeros((600, 32, 32, 3), np.uint8)))
    pipe(folder / "set" / RECIPE)
    return flags


@fault(optimize, "is a folder, expected a file")
def the_root_as_checkpoint(folder):
    return ["--checkpoint", "/"]


@fault(optimize, "it is a damaged zip archive")
def a_zip_archive_with_a_broken_directory(folder):
    content = bytearray((folder / "last_model.th").read_bytes())
    place = content.rindex(b"PK\x01\x02")
    content[place : place + 4] = b"PKxx"
    return ["--checkpoint", written(folder / "broken.th", bytes(content))]


@fault(prune, "MB, expected 16000 MB at most")
def masks_of_terabytes(folder):
    with (folder.parent / "large.txt").open("wb") as file:
        file.truncate(10**12)
    return ["--mask-file", f"{folder.parent}/large.txt"]


@fault(optimize, "poison_target is no array of numbers")
def a_target_that_repeats_itself_to_gigabytes(folder):
    return edit_trigger(folder, poison_target=torch.zeros(1, dtype=torch.float64).expand(2**28))


@fault(optimize, "is a folder, expected a file")
def a_folder_as_checkpoint(folder):
    return ["--checkpoint", str(folder)]


@fault(optimize, "is a folder, expected a file")
def a_folder_as_split(folder):
    return ["--split-file", str(folder)]


@fault(prune, "is a folder, expected a file")
def a_folder_as_masks(folder):
    return ["--mask-file", str(folder)]


@fault(optimize, "last_model.json: cannot be read")
def a_card_that_is_a_loop_of_links(folder):
    (folder / "last_model.json").unlink()
    (folder / "last_model.json").symlink_to("last_model.json")
    return []


@fault(optimize, "last_model.json: no such file")
def a_card_that_is_a_link_to_nothing(folder):
    (folder / "last_model.json").unlink()
    (folder / "last_model.json").symlink_to("nothing.json")
    return []


# ---- sizes


@fault(optimize, "trigger_pattern is no array of numbers .*numbers")
def a_trigger_that_repeats_itself_to_gigabytes(folder):
    huge = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(500_000, 64, 64, 3)
    return edit_trigger(folder, trigger_pattern=huge, trigger_mask=torch.ones(1, 1, 1, 1).expand(500_000, 64, 64, 1))


@fault(train, "expected one array of whole numbers of shape|cannot be read as a .npy file")
def an_array_that_claims_terabytes(folder):
    def write(path):
        header = {"descr": "|u1", "fortran_order": False, "shape": (2_000_000, 1_000, 1_000, 4)}
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)

    return clean_label(folder, write)


@fault(prune, "line 2 is 'x{76}\\.\\.\\., expected|line 2 is 'x*\\.\\.\\., expected")
def masks_of_one_long_line(folder):
    head = " \t ".join(("No", "Layer Name", "Neuron Idx", "Mask Score"))
    return ["--mask-file", written(folder / "long.txt", f"{head} \n{'x' * 5_000_000}\n")]


@fault(prune, "MB, expected 64 MB at most")
def masks_of_gigabytes(folder):
    with (folder / "large.txt").open("wb") as file:
        file.truncate(2**31)
    return ["--mask-file", f"{folder}/large.txt"]


@fault(optimize, "last_model.json: 2 MB, expected 1 MB at most")
def a_card_of_megabytes(folder):
    return edit_card(folder, note="x" * 2_000_000)


@fault(optimize, "a compressed archive")
def a_checkpoint_that_grows_when_unpacked(folder):
    import zipfile

    with zipfile.ZipFile(folder / "bomb.th", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\0" * 50_000_000)
    return ["--checkpoint", f"{folder}/bomb.th"]


@fault(optimize, "holds resnet18, width 0.125, 10 classes, not resnet18, width 64; leave out --arch and --widen-factor")
def a_card_of_width_64(folder):
    return edit_card(folder, widen_factor=64)


@fault(optimize, "holds resnet18, width 0.125, 10 classes, not resnet18, width 64.0; leave out")
def a_flag_of_width_64(folder):
    (folder / "last_model.json").unlink()
    return ["--widen-factor", "64", "--dataset", "tiny"]


@fault(train, "this network with batches of 128 images needs about .* lower --batch-size or take a narrower network")
def a_training_of_width_64(folder):
    return ["--widen-factor", "64"]


@fault(optimize, "this network with batches of 99999 images needs about")
def a_batch_of_99999(folder):
    return ["--batch-size", "99999"]


# ---- control characters


@fault(optimize, r"unexpected \(\\x1b\[31mred\\nline")
def keys_that_steer_the_terminal(folder):
    return replace_weight(folder, f"{ESCAPE}red\nline\0" + "x" * 100_000, torch.ones(1))


@fault(optimize, r"\\x1b\[31m.*no such file")
def a_path_that_steers_the_terminal(folder):
    return ["--checkpoint", f"{folder}/{ESCAPE}.th"]


@fault(prune, r"\\x1b")
def layers_that_steer_the_terminal(folder):
    text = (folder / "mask_values.txt").read_text().replace(" bn1 ", f" {ESCAPE}bn1 ")
    return ["--mask-file", written(folder / "other.txt", text)]


@fault(train, r"'\.\./\\x1b\[31m.*' is outside the folder")
def picture_names_that_steer_the_terminal(folder):
    return pictures(folder, f"../{ESCAPE}b.png")


@fault(train, r"cannot be read .*null|no such file")
def a_picture_name_with_a_null_character(folder):
    flags = pictures(folder, "b.png")
    table = folder / "pictures" / "poisoned.csv"
    written(table, table.read_bytes().replace(b"b.png", b"b\\0.png".replace(b"\\0", b"\0")))
    return flags


# ---- what is in the files


@fault(optimize, "bn1.weight is no dense tensor")
def nested_tensors(folder):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    return replace_weight(folder, "bn1.weight", nested)


@fault(optimize, "trigger_mask is no array of numbers")
def a_trigger_of_nested_tensors(folder):
    return edit_trigger(folder, trigger_mask=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))


@fault(optimize, "last_model.json: not JSON")
def a_card_nested_too_deeply(folder):
    written(folder / "last_model.json", '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    return []


@fault(optimize, "widen_factor is '0.125'")
def a_card_with_text_for_a_number(folder):
    return edit_card(folder, widen_factor="0.125")


@fault(optimize, "normalization is")
def a_card_with_texts_for_the_std(folder):
    return edit_card(folder, normalization={"mean": [0.5, 0.5, 0.5], "std": ["0.2", "0.2", "0.2"]})


@fault(optimize, "normalization is")
def a_card_with_an_infinite_std(folder):
    return edit_card(folder, normalization={"mean": [0.5, 0.5, 0.5], "std": [float("inf")] * 3})


@fault(optimize, "normalization is")
def a_card_with_a_std_of_nothing(folder):
    return edit_card(folder, normalization={"mean": [0.5, 0.5, 0.5], "std": [1e-300] * 3})


@fault(optimize, "trigger_alpha is 0")
def a_trigger_without_opacity(folder):
    return edit_trigger(folder, trigger_alpha=0.0)


@fault(optimize, "trigger_mask is 0")
def a_trigger_without_a_mask(folder):
    return edit_trigger(folder, trigger_mask=torch.zeros(1, 32, 32, 1))


@fault(optimize, "changes none of 180 test images")
def a_trigger_that_adds_nothing(folder):
    return edit_trigger(folder, trigger_mode="add", trigger_pattern=torch.zeros(1, 32, 32, 1))


@fault(train, "recipe.json: trigger_alpha is 5, expected a number above 0, at most 1")
def a_recipe_with_an_opacity_of_5(folder):
    def write(path):
        np.save(path, np.zeros((600, 32, 32, 3), np.uint8))

    return clean_label(folder, write, {"trigger_alpha": 5})


@fault(train, "recipe.json: trigger_alpha is '1'")
def a_recipe_with_text_for_a_number(folder):
    def write(path):
        np.save(path, np.zeros((600, 32, 32, 3), np.uint8))

    return clean_label(folder, write, {"trigger_alpha": "1"})


@fault(train, r"train_images.npy: cannot be read as a \.npy file of numbers; write it with numpy\.save")
def an_array_of_pickled_objects(folder):
    return clean_label(folder, lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True))


@fault(optimize, "damaged, 'archive/data/.*' does not match its checksum|damaged, .* does not match its checksum")
def one_flipped_byte(folder):
    (folder / "last_model.json").unlink()
    content = bytearray((folder / "last_model.th").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "last_model.th").unlink()
    return ["--checkpoint", written(folder / "flipped.th", bytes(content)), "--dataset", "tiny", *WIDTH]


@fault(optimize, "bn1.running_var holds negative variances")
def negative_variances(folder):
    return replace_weight(folder, "bn1.running_var", -torch.ones(8))


@fault(optimize, r"asks to run .*Linear.*weights alone: torch\.save\(model\.state_dict\(\), path\)")
def a_pickled_network(folder):
    torch.save(torch.nn.Linear(2, 2), folder / "whole.th")
    return ["--checkpoint", f"{folder}/whole.th"]


@fault(optimize, "it is a Git LFS pointer")
def a_pointer_of_git_lfs(folder):
    return ["--checkpoint", written(folder / "lfs.th", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")]


@fault(optimize, "it is a web page")
def a_web_page(folder):
    return ["--checkpoint", written(folder / "page.th", "<!DOCTYPE html><title>Quota exceeded</title>")]


@fault(optimize, "it is a zip archive of something else")
def an_npz_file(folder):
    np.savez(folder / "arrays.npz", a=np.ones(3))
    return ["--checkpoint", f"{folder}/arrays.npz"]


@fault(train, "b.png: not a readable picture")
def a_picture_that_another_program_would_open(folder):
    """Pillow would hand PostScript to Ghostscript."""
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    return pictures(folder, "b.png", lambda path: written(path, text))


@fault(train, "a column name repeats")
def a_table_with_two_labels(folder):
    flags = pictures(folder, "b.png")
    table = folder / "pictures" / "poisoned.csv"
    written(table, table.read_text().replace("file,label", "label,label"))
    return flags


@fault(prune, "--pruning-step 700: the network has 600 neurons")
def a_sweep_without_a_point(folder):
    return ["--pruning-by", "number", "--pruning-max", "700", "--pruning-step", "700"]


@fault(optimize, "a TorchScript program.*weights alone")
def a_torchscript_program(folder):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(folder / "script.th")
    return ["--checkpoint", f"{folder}/script.th"]


@fault(prune, "split file|not the split|expected 600 whole numbers")
def a_split_of_words(folder):
    return ["--split-file", written(folder / "split.txt", "one\ntwo\n")]


@fault(prune, "not a UTF-8 text file .*save it as UTF-8")
def masks_in_utf_16(folder):
    return ["--mask-file", written(folder / "wide.txt", (folder / "mask_values.txt").read_text().encode("utf-16"))]


# ---- runs that come to nothing


@fault(optimize, "loss on clean images is nan; look at --mean and --std, and at the checkpoint")
def weights_that_overflow(folder):
    return replace_weight(folder, "linear.weight", torch.full((10, 64), 3e38))


@fault(optimize, "loss on clean images is nan; the masks diverged; lower --lr or --anp-eps")
def a_perturbation_without_bounds(folder):
    return ["--anp-eps", "1e308"]


@fault(prune, "--number 601: the network has 600 neurons")
def more_neurons_than_there_are(folder):
    return ["--number", "601"]


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name, folder, capsys):
    case = FAULTS[name]
    flags = case.prepare(folder)
    before = contents(folder)
    capsys.readouterr()
    status = case.script.main([*base(case.script, folder), *flags])
    line = one_line(capsys.readouterr().err)
    assert status == 1 and re.search(case.message, line), line
    assert len(line) < 900 + 3 * len(str(folder)), "nothing is echoed at length"
    assert contents(folder) == before
    out = folder / "out"
    assert not out.exists() or {path.suffix for path in out.iterdir()} <= {"", ".lock", ".json", ".jsonl", ".th"}
    assert not (out / "mask_values.txt").exists() and not (out / "last_model.th").exists()


@pytest.mark.parametrize("script", [train, optimize, prune])
def test_without_a_fault_the_same_flags_succeed(script, folder, capsys):
    assert script.main(base(script, folder)) == 0
    assert capsys.readouterr().err == ""


# ---- resuming


def interrupted(folder, monkeypatch, *flags):
    """Interrupt step 2 after an update; return its resume state and the flags of the run."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert optimize.main([*base(optimize, folder), *flags]) == 130
    return folder / "out" / "optimize_resume.th"


def without(*keys):
    def edit(state):
        inner = state
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]

    return edit


def having(value, *keys):
    def edit(state):
        inner = state
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return edit


EDITS = {
    "no options": without("options"),
    "no loop": without("loop"),
    "no mask": without("loop", "mask"),
    "no sums": without("loop", "means", "sums"),
    "no rows": without("rows"),
    "a row without a column": without("rows", 0, "iteration"),
    "a mask of another shape": having(torch.ones(3), "loop", "mask"),
    "a mask of text": having("text", "loop", "mask"),
    "an iteration of text": having("3", "loop", "iteration"),
    "an iteration that never ends": having(-(10**12), "loop", "iteration"),
    "an iteration past the end": having(10**12, "loop", "iteration"),
    "half an iteration": having(1.5, "loop", "iteration"),
    "a weight of text": having("x", "loop", "means", "weight"),
    "seconds of text": having("long", "seconds"),
    "rows that are a text": having("rows", "rows"),
    "rows of numbers": having([1, 2], "rows"),
    "a text in a row": having("text", "rows", 0, "iteration"),
    "runtime of text": having("cpu", "runtime"),
    "a device that is none": having("abacus", "runtime", "device"),
    "threads of text": having("many", "runtime", "threads"),
}


@pytest.mark.parametrize("name", EDITS)
def test_resume_states_that_were_edited(name, folder, monkeypatch, capsys):
    path = interrupted(folder, monkeypatch)
    state = torch.load(path)
    EDITS[name](state)
    torch.save(state, path)
    before = sha256_of(path)
    capsys.readouterr()
    assert optimize.main([*base(optimize, folder), "--resume"]) == 1
    assert re.search("not a resume state of this .*--overwrite", one_line(capsys.readouterr().err))
    assert sha256_of(path) == before


@pytest.mark.parametrize(
    "flags", [["--print-every", "3"], ["--data-dir", "elsewhere"], ["--checkpoint", "COPY"]], ids=lambda flags: flags[0]
)
def test_what_does_not_matter_may_differ_when_a_run_is_resumed(flags, folder, monkeypatch):
    interrupted(folder, monkeypatch)
    shutil.copytree(folder, folder / "copy", ignore=shutil.ignore_patterns("out"))
    flags = [word.replace("COPY", f"{folder}/copy/last_model.th") for word in flags]
    assert optimize.main([*base(optimize, folder), "--resume", *flags]) == 0
    assert (folder / "out" / "mask_values.txt").read_bytes() == (folder / "mask_values.txt").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threads", "7"], "--threads is 7 but was [12] in the run to resume; leave it out to go on with [12]"),
        (["--lr", "0.3"], "--lr is 0.3 but was 0.2 before, in the run to resume"),
        (["--std", "0.2", "0.2", "0.2"], "--std .* contradicts the card"),
        (["--split-file", "SPLIT"], "--split-file is given, unlike before, in the run to resume"),
        (["--anp-project"], "--anp-project is True but was False before, in the run"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_matters_may_not(flags, message, folder, monkeypatch, capsys):
    interrupted(folder, monkeypatch)
    flags = [written(folder / "split.txt", "0") if word == "SPLIT" else word for word in flags]
    capsys.readouterr()
    assert optimize.main([*base(optimize, folder), "--resume", *flags]) == 1
    assert re.search(message, one_line(capsys.readouterr().err))


def test_resume_in_an_empty_folder_says_that_it_starts_anew(folder, capsys):
    assert optimize.main([*base(optimize, folder), "--resume"]) == 0
    assert "nothing to resume here; starting from the beginning" in capsys.readouterr().out


# ---- --overwrite


def test_overwriting_takes_along_what_was_made_of_the_old_network(folder):
    assert prune.main([*base(prune, folder), "--output-dir", str(folder)]) == 0
    (folder / "optimize_resume.th").write_bytes(b"of the old network")
    (folder / "mine.txt").write_text("not of any step")
    assert train.main([*base(train, folder), "--output-dir", str(folder), "--overwrite", "--seed", "1"]) == 0
    names = {path.name for path in folder.iterdir()}
    assert "last_model.th" in names and "mine.txt" in names
    assert not [name for name in names if name.startswith(("mask", "optimize", "prun", "repaired"))]


def test_overwriting_the_masks_takes_the_repaired_network_along(folder):
    assert prune.main([*base(prune, folder), "--output-dir", str(folder)]) == 0
    assert optimize.main([*base(optimize, folder), "--output-dir", str(folder), "--overwrite"]) == 0
    assert (folder / "last_model.th").exists() and (folder / "mask_values.txt").exists()
    assert not list(folder.glob("repaired*")) + list(folder.glob("pruning*"))


NOTES = (
    "repaired_model.threshold.th", "repaired_model.mynotes.md", "pruning_by_threshold.xlsx", "last_model.backup.th",
    "last_model.README", "model_20.old.th", "mask_values.final.txt", "model_best.th",
)  # fmt: skip


def test_files_of_the_user_survive_whatever_they_are_called(folder):
    for name in NOTES:
        (folder / name).write_text("mine")
    for script in (train, optimize, prune):
        assert script.main([*base(script, folder), "--output-dir", str(folder), "--overwrite"]) == 0
    assert [name for name in NOTES if (folder / name).exists()] == list(NOTES)


@pytest.mark.parametrize("name", ["mask_values.txt", "repaired_model.json", "optimize_resume.th"])
def test_a_folder_in_the_place_of_a_file_is_found_before_anything_goes(name, folder, capsys):
    for path in folder.glob(name):
        path.unlink()
    (folder / name).mkdir()
    before = contents(folder)
    capsys.readouterr()
    assert optimize.main([*base(optimize, folder), "--output-dir", str(folder), "--overwrite"]) == 1
    assert f"{name}: a folder lies where a file is to be written" in one_line(capsys.readouterr().err)
    assert contents(folder) == before


def test_a_complete_run_without_its_result_is_not_called_complete(folder, capsys):
    flags = [*base(optimize, folder), "--output-dir", str(folder), "--resume"]
    assert optimize.main(flags) == 0
    assert "nothing to resume" in capsys.readouterr().out
    (folder / "mask_values.txt").unlink()
    assert optimize.main(flags) == 1
    assert "is there already" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("script", [train, optimize, prune])
def test_a_power_cut_while_results_are_written_needs_resume_alone(script, folder, monkeypatch):
    """The log says that the run has not ended, and the state lies beside the results."""
    with monkeypatch.context() as patch:
        patch.setattr("utils.run.Run.finish", nothing_left)
        with pytest.raises(SystemExit):
            script.main(base(script, folder))
    results = contents_of(folder / "out")
    assert script.main([*base(script, folder), "--resume"]) == 0
    assert contents_of(folder / "out") == results


def nothing_left(run):
    raise SystemExit


def contents_of(out):
    return {
        path.name: sha256_of(path)
        for path in out.iterdir()
        if path.suffix in (".th", ".txt") and "resume" not in path.name
    }


def test_what_the_card_says_may_be_said_when_a_run_is_resumed(folder, monkeypatch):
    interrupted(folder, monkeypatch)
    flags = [*WIDTH, "--arch", "resnet18", "--std", "0.25", "0.25", "0.25"]
    assert optimize.main([*base(optimize, folder), "--resume", *flags]) == 0


def test_another_card_is_noticed_when_a_run_is_resumed(folder, monkeypatch, capsys):
    interrupted(folder, monkeypatch)
    edit_card(folder, normalization={"mean": [0.5, 0.5, 0.5], "std": [0.3, 0.3, 0.3]})
    capsys.readouterr()
    assert optimize.main([*base(optimize, folder), "--resume"]) == 1
    assert "normalization is" in one_line(capsys.readouterr().err)


def test_one_sweep_leaves_the_other_but_not_its_network(folder, capsys):
    by_number = ["--pruning-by", "number", "--pruning-max", "10", "--pruning-step", "10"]
    assert prune.main([*base(prune, folder), "--output-dir", str(folder)]) == 0
    assert prune.main([*base(prune, folder), *by_number, "--output-dir", str(folder)]) == 1
    assert "repaired_model.th is there already" in capsys.readouterr().err
    assert prune.main([*base(prune, folder), *by_number, "--output-dir", str(folder), "--overwrite"]) == 0
    assert (folder / "pruning_by_threshold.txt").exists() and (folder / "pruning_by_number.txt").exists()


def test_bad_input_is_found_before_anything_is_overwritten(folder, capsys):
    before = contents(folder)
    flags = ["--output-dir", str(folder), "--overwrite", "--trigger-info", f"{folder}/none.th"]
    assert optimize.main([*base(optimize, folder), *flags]) == 1
    assert contents(folder) == before


def test_what_a_failed_run_left_needs_no_overwriting(folder, capsys):
    diverging = [*base(train, folder), "--lr", "1e20"]
    assert train.main(diverging) == 1
    assert (folder / "out" / "trigger_info.th").exists()
    assert train.main(base(train, folder)) == 0


@pytest.mark.parametrize("script", [optimize, prune])
def test_a_full_disk_is_named_and_takes_nothing_along(script, folder, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    assert prune.main([*base(prune, folder), "--output-dir", str(folder)]) == 0
    before = contents(folder)
    monkeypatch.setattr("os.fsync", full)
    capsys.readouterr()
    assert script.main([*base(script, folder), "--output-dir", str(folder), "--overwrite"]) == 1
    assert re.search(r"save/\w+_log.jsonl: No space left on device", one_line(capsys.readouterr().err))
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", ""], "argument --checkpoint/--checkpoints: expected a name, found an empty text"),
        (["--checkpont", "x"], r"unrecognized arguments: --checkpont x \(did you mean --checkpoint\?\)"),
        (["--std", "1e-300", "1", "1"], "out of range"),
        (["--anp-eps", ESCAPE], r"invalid number value: '\\x1b\[31m'"),
        (["--nb-iter", "9" * 400], "out of range"),
        (["--lr", "inf"], r"argument --lr: inf is out of range: it must be above 0; --help"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_flags_are_one_line(flags, message, folder, capsys):
    with pytest.raises(SystemExit) as caught:
        optimize.main([*base(optimize, folder), *flags])
    line = one_line(capsys.readouterr().err)
    assert caught.value.code == 2 and re.search(message, line) and line.endswith("--help shows every flag"), line


@pytest.mark.parametrize("script", [train, optimize, prune])
def test_help_and_version(script, capsys):
    for flag, expected in (("--version", "adversarial-neuron-pruning 1.0.0"), ("--help", "usage")):
        with pytest.raises(SystemExit) as caught:
            script.main([flag])
        out = capsys.readouterr().out
        assert caught.value.code == 0 and out.startswith(expected) and "(default: )" not in out


def test_a_card_of_a_checkpoint_that_is_named_like_a_card(tmp_path):
    path = tmp_path / "x.json"
    torch.save({"w": torch.ones(1)}, path)
    assert read_card(path) is None


def test_a_byte_order_mark_is_no_fault(folder):
    """Editors of Windows put it at the beginning of a text."""
    masks = written(folder / "marked.txt", "\ufeff" + (folder / "mask_values.txt").read_text())
    split = written(folder / "split.txt", "\ufeff" + "\n".join(map(str, draw_permutation(600).tolist())))
    assert prune.main([*base(prune, folder), "--mask-file", masks, "--split-file", split]) == 0


def test_a_message_is_safe_for_a_python_caller_too():
    assert str(InputError(f"no {ESCAPE}key\n\0\u202e")) == r"no \x1b[31mkey\n\x00\u202e"


def test_weights_and_triggers_in_odd_but_readable_forms(folder, capsys, recwarn):
    state = torch.load(folder / "last_model.th")
    odd = {name: t.to(torch.float8_e5m2) if t.dim() == 1 and t.is_floating_point() else t for name, t in state.items()}
    torch.save(odd, folder / "odd.th")
    edit_trigger(folder, trigger_mask=torch.nn.Parameter(torch.load(folder / "trigger_info.th")["trigger_mask"]))
    masks = written(folder / "masks.txt", (folder / "mask_values.txt").read_text() + "\n\n")
    assert (
        optimize.main([*base(optimize, folder), "--checkpoint", f"{folder}/odd.th", "--dataset", "tiny", *WIDTH]) == 0
    )
    assert prune.main([*base(prune, folder), "--output-dir", f"{folder}/out2", "--mask-file", masks]) == 0
    assert capsys.readouterr().err == "" and not [w for w in recwarn if "requires_grad" in str(w.message)]


# ---- silence


def test_what_is_not_verified_is_said(folder, capsys):
    (folder / "last_model.json").unlink()
    assert optimize.main([*base(optimize, folder), "--dataset", "tiny", *WIDTH]) == 0
    assert "no card, so nothing says whether these are the bytes" in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "said"), [(1.1, True), (0.5, False)])
def test_an_attack_that_failed_is_said(limit, said, folder, capsys, monkeypatch):
    """The tiny network answers 0, the target, to everything: an ASR of 100 %."""
    monkeypatch.setattr(train, "TAKEN_HOLD", limit)
    assert train.main(base(train, folder)) == 0
    assert ("warning: the attack has hardly taken hold" in capsys.readouterr().out) == said


def test_masks_that_leave_a_guessing_network(folder):
    subject = Subject(None, None, True, ImageSet(torch.zeros(60, 1), torch.zeros(60, dtype=torch.int64), 10), {})
    rows = [{"defender acc %": 90.0}, {"defender acc %": 10.0}]
    with pytest.raises(InputError, match=r"only guesses \(10.0 % of the clean images, 90.0 % before\).*lower --lr"):
        optimize.refuse_useless(rows, subject)
    optimize.refuse_useless(rows[::-1], subject)


@pytest.mark.parametrize("ruined", [True, False])
def test_a_pruning_that_leaves_a_guessing_network_is_said(folder, capsys, monkeypatch, ruined):
    """The tiny network guesses before, too, so what is ruined is decided here."""
    monkeypatch.setattr(prune, "is_ruined", lambda before, after, images: ruined)
    assert prune.main(base(prune, folder)) == 0
    assert ("warning: the repaired network only guesses" in capsys.readouterr().out) == ruined


@pytest.mark.parametrize(("accuracy", "guessing"), [(0.05, True), (0.1, True), (0.13, True), (0.15, False)])
def test_guessing_is_within_three_standard_errors(accuracy, guessing):
    from engine.evaluation import is_guessing

    assert is_guessing(accuracy, 10, 500) == guessing  # 0.1 + 3 * sqrt(0.1 * 0.9 / 500) = 0.140


# ---- an error nobody foresaw


def test_an_unforeseen_error_is_one_line_and_a_file(folder, monkeypatch, capsys):
    def broken(*_):
        raise KeyError("of\nall things")

    monkeypatch.setattr(optimize, "plot_masks", broken)
    capsys.readouterr()
    assert optimize.main(base(optimize, folder)) == 70
    line = one_line(capsys.readouterr().err)
    path = folder / "out" / "optimize_error.log"
    assert "internal error (KeyError" in line and line.endswith(str(path))
    assert "Traceback" in path.read_text() and "of\\nall things" in path.read_text()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_too_little_memory_is_one_line(error, folder, monkeypatch, capsys):
    def broken(*_):
        raise error

    monkeypatch.setattr(optimize, "plot_masks", broken)
    capsys.readouterr()
    assert optimize.main(base(optimize, folder)) == 1
    assert "out of memory; smaller batches" in one_line(capsys.readouterr().err)


# ---- signals and streams


def start(step, *flags, shell="{}", **environment):
    """Start a script as a program, through a line of shell."""
    command = " ".join(f"'{word}'" for word in (sys.executable, "-m", "tests.small", step, *map(str, flags)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        ["bash", "-c", shell.format(command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process):
    out, error = process.communicate()
    return process.returncode, out.decode(), error.decode()


@pytest.mark.parametrize("count", [2, 5])
def test_a_second_signal_ends_a_long_update_at_once(count, folder, capsys, monkeypatch):
    """A million ascent steps would take hours."""
    timers = [threading.Timer(0.3 * (n + 1), os.kill, (os.getpid(), signal.SIGINT)) for n in range(count)]
    ascend = anp.ascend

    def ascend_and_be_interrupted(*given):
        for timer in timers:
            timer.start()
        return ascend(*given)

    monkeypatch.setattr(anp, "ascend", ascend_and_be_interrupted)
    assert optimize.main([*base(optimize, folder), "--anp-steps", "1000000"]) == 130
    for timer in timers:
        timer.cancel()
    assert one_line(capsys.readouterr().err).startswith("optimize: interrupted; ")
    assert not (folder / "out" / "optimize_resume.th").exists(), "in the middle of an update there is no state to save"


def test_a_signal_during_the_imports_ends_in_silence(tmp_path):
    """The place of torch is taken by a module that interrupts itself."""
    (tmp_path / "torch").mkdir()
    written(
        tmp_path / "torch" / "__init__.py",
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)",
    )
    for script in ("train_backdoor_cifar", "optimize_mask_cifar", "prune_neuron_cifar"):
        done = subprocess.run(
            [sys.executable, ROOT / f"{script}.py", "--help"],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
        )
        assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_many_signals_end_like_one(folder):
    process = start("optimize", *base(optimize, folder), "--nb-iter", 100_000, shell="exec {}")
    while not list((folder / "out").glob("optimize_resume.th")):
        assert process.poll() is None, finish(process)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        threading.Event().wait(0.02)
    status, _, error = finish(process)
    assert status == 130 and "continue with --resume" in one_line(error)


def test_closed_streams_stop_nothing(folder):
    process = start("prune", *base(prune, folder), shell="exec {} <&- >&- 2>&-")
    assert finish(process) == (0, "", "")
    assert (folder / "out" / "repaired_model.th").exists()


def test_a_reader_that_has_gone_is_an_interruption(folder):
    process = start(
        "optimize", *base(optimize, folder), "--nb-iter", 100_000, shell="{} | head -5; exit ${{PIPESTATUS[0]}}"
    )
    status, out, error = finish(process)
    assert status == 130 and out.count("\n") == 5 and "interrupted; continue with --resume" in one_line(error)
    assert (folder / "out" / "optimize_resume.th").exists()


def test_letters_that_the_output_cannot_show(folder):
    place = folder / "ü\udcff"
    process = start("prune", *base(prune, folder), "--output-dir", place, shell="exec {}", PYTHONIOENCODING="ascii")
    status, out, error = finish(process)
    assert (status, error) == (0, "") and r"\xfc\udcff/repaired_model.th" in out
