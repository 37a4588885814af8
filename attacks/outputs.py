"""What step 1 leaves in its folder beside the network."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from attacks.attack import Workspace
from data.datasets import Dataset
from data.split import absolute
from data.triggers import Trigger, attacked_index
from formats.plots import plot_images
from formats.trigger_file import save_trigger
from utils.run import versions

TITLE = 14  # characters that fit above a picture


def _title(name: str) -> str:
    return name if len(name) <= TITLE else name[: TITLE - 1] + "…"


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
    index = attacked_index(dataset.test, trigger)[:8]
    clean = dataset.test.images[index]
    aims = trigger.target.expand(len(dataset.test))[index.cpu()]
    leads = zip(dataset.test.labels[index].tolist(), aims.tolist(), strict=True)
    titles = [f"{_title(dataset.classes[label])}\n→ {_title(dataset.classes[aim])}" for label, aim in leads]
    plot_images(folder / "clean_and_triggered.png", clean, trigger.stamp(clean, index), titles)


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
        **workspace.model.entries(),
        **dataset.describe(),
        "normalization": asdict(dataset.normalization),
        "split": {"file": absolute(split_file), "sha256": workspace.split},
        "attack": attack,
        "seed": workspace.seed,
        "command": command,
        "versions": versions(),
    }
