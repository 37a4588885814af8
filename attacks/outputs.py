"""What step 1 leaves in its folder beside the network, and what it must not lose there."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.attack import Workspace
from attacks.image_folder import refuse_other_files
from data.datasets import Dataset
from data.split import absolute
from data.triggers import Trigger
from formats.plots import plot_images
from formats.trigger_file import save_trigger
from utils.errors import InputError
from utils.run import Run, versions

OWN_FILES = (
    "last_model.*",
    "model_*.th",
    "model_*.json",
    "generators.*",
    "trigger_info.th",
    "clean_and_triggered.png",
    "clean_and_triggered.pdf",
    "train_log.jsonl",
    "train_curves.png",
    "train_curves.pdf",
)


def write_trigger(folder: Path, trigger: Trigger | None, dataset: Dataset, data_index: Tensor) -> None:
    """Write the trigger file and the picture of clean and triggered images, where there is a trigger.

    Args:
        folder: of the run.
        trigger: of the attack.
        dataset: its test images are what the trigger is for.
        data_index: int64; the poisoned ones among the dataset's training images.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    if trigger is None:
        return
    trigger = trigger.aimed_at(dataset.test)
    save_trigger(folder / "trigger_info.th", trigger, data_index)
    labels = dataset.test.labels.cpu()
    target = trigger.target.expand(len(labels))
    index = torch.nonzero(labels != target).flatten()[:8]
    clean = dataset.test.images[index.to(dataset.test.images.device)]
    leads = zip(labels[index].tolist(), target[index].tolist(), strict=True)
    titles = [f"{dataset.classes[label]}\n→ {dataset.classes[aim]}" for label, aim in leads]
    plot_images(folder / "clean_and_triggered.png", clean, trigger.stamp(clean, index), titles)


def refuse_to_lose_files(args: argparse.Namespace, run: Run) -> None:
    """Make sure, before any work is done, that no trained network and no input is lost.

    Raises:
        InputError: a trained network is there, and neither ``--overwrite`` was given nor is this run a continuation;
            an input would be overwritten; other files lie where the poisoned set shall go.
    """
    output = run.folder.resolve()
    if args.clb_surrogate and Path(args.clb_surrogate).resolve().parent == output:
        raise InputError(f"--clb-surrogate {args.clb_surrogate} lies in --output-dir; choose another --output-dir")
    for flag, path in (("--clb-dir", args.clb_dir), ("--poisoned-dir", args.poisoned_dir)):
        if path and Path(path).resolve() in (output, *output.parents):
            raise InputError(f"{flag} {path} holds --output-dir {run.folder}; choose another --output-dir")
    if args.export_poisoned:
        refuse_other_files(Path(args.export_poisoned))
    trained = {*run.folder.glob("last_model.th"), *run.folder.glob("model_*.th")} - {run.folder / "model_init.th"}
    if trained and not (run.overwriting or run.saved):
        raise InputError(f"{min(trained)} is there already; choose another --output-dir or --overwrite")


def clear_folder(folder: Path) -> None:
    """Make sure that nothing of an older training is left to be taken for this one's."""
    for pattern in OWN_FILES:
        for path in folder.glob(pattern):
            path.unlink()


def network_card(workspace: Workspace, split_file: str | None, attack: dict[str, Any], command: str) -> dict[str, Any]:
    """Return what the model card says about every checkpoint of a training.

    Args:
        workspace: of the run.
        split_file: the file of its split; None for the project's own.
        attack: what is said about the attack.
        command: of the run.
    """
    dataset = workspace.dataset
    return {
        **asdict(workspace.model),
        "num_classes": dataset.num_classes,
        "dataset": dataset.name,
        "normalization": asdict(dataset.normalization),
        "split": {"file": absolute(split_file), "sha256": workspace.split},
        "attack": attack,
        "seed": workspace.seed,
        "command": command,
        "versions": versions(),
    }
