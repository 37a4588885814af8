"""Clean-label backdoor (Turner, Tsipras, Madry 2019): labels stay, target-class images carry four checkerboards.

The images are made hard to classify first, so that the network learns the trigger instead.
"""

import io
import json
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks.attack import AttackContext, PoisonedSet, draw_poisoned_index, target_class
from attacks.badnets import corner_checkerboard
from attacks.pgd import pgd
from data.datasets import ImageSet, Normalization
from data.errors import InputError
from data.split import permutation_digest
from data.triggers import Trigger
from utils.evaluation import inference_copy
from utils.files import sha256_of, write_bytes, write_json
from utils.run import announce
from utils.subject import load_surrogate

IMAGES, LABELS, RECIPE = "train_images.npy", "train_labels.npy", "recipe.json"
BUILDING = ("poison_rate", "clb_eps", "clb_steps", "clb_step_size")  # flags for building a set
PGD_BATCH = 100  # images perturbed at a time


def check_clean_label(options: Namespace) -> set[str]:
    """Return the flags that a set which is read decides by itself.

    Raises:
        ValueError: none or two sources are named, or a flag is given that only matters where a set is built.
    """
    if bool(options.clb_dir) == bool(options.clb_surrogate):
        raise ValueError(
            "--poison-type clean-label needs either --clb-surrogate FILE, a clean network to build the set against, or "
            f"--clb-dir DIR with {IMAGES} and {LABELS}"
        )
    if not options.clb_dir:
        return set()
    for name in BUILDING:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no effect with --clb-dir; leave it out")
    return {*BUILDING, "trigger_alpha"}


def four_corner_checkerboard(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return pattern uint8 and mask float64, (1, H, W, 1) each: the checkerboard in every corner.

    The right-hand corners carry it as in BadNets, the left-hand ones mirrored left-right.
    """
    pattern, mask = corner_checkerboard(height, width)
    for whole in (pattern, mask):
        whole[:, :3] = whole[:, -3:]
        whole[:, :, :3] = whole[:, :, -3:].flip(2)
    return pattern, mask


def poison_clean_label(context: AttackContext) -> PoisonedSet:
    """Build the poisoned set against a surrogate and keep it in the run's folder, or read a published one.

    Raises:
        InputError: the target is no class, the surrogate cannot be used, the rate leaves no image to poison, or the
            folder is not as ``read_clean_label_set`` needs it.
        OSError: the set cannot be written.
    """
    if context.options.clb_dir:
        return read_clean_label_set(context, Path(context.options.clb_dir))
    folder = context.run.folder / "clean_label_set"
    target_class(context)
    network, normalization = load_surrogate(
        context.options.clb_surrogate, context.options, context.dataset, context.permutation
    )
    recipe = _recipe(context)
    if not _is_there(folder, recipe):
        network = inference_copy(network.to(context.runtime.device), context.runtime.precision).requires_grad_(False)
        build_clean_label_set(context, folder, recipe, network, normalization)
    return read_clean_label_set(context, folder)


def _recipe(context: AttackContext) -> dict[str, Any]:
    """Return all that a built set depends on."""
    names = ("poison_target", "trigger_alpha", *BUILDING, "seed")
    return {
        **{name: getattr(context.options, name) for name in names},
        "dataset": context.dataset.name,
        "split": permutation_digest(context.permutation),
        "surrogate": sha256_of(context.options.clb_surrogate),
        "runtime": [str(context.runtime.device), str(context.runtime.precision), torch.get_num_threads()],
        "torch": torch.__version__,
    }


def _read_recipe(folder: Path) -> dict[str, Any]:
    """Return what a set was built from; empty where that is not known."""
    try:
        recipe = json.loads((folder / RECIPE).read_text())
    except (FileNotFoundError, ValueError):  # not ours, or damaged: then it is built again
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _digests(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in (IMAGES, LABELS) if (folder / name).exists()}


def _is_there(folder: Path, recipe: dict[str, Any]) -> bool:
    """Say whether a set of the same recipe was built before, as when a training is resumed."""
    return _read_recipe(folder) == {**recipe, "sha256": _digests(folder)}


def build_clean_label_set(
    context: AttackContext, folder: Path, recipe: dict[str, Any], network: nn.Module, normalization: Normalization
) -> None:
    """Perturb and stamp a share of the attacker's target-class images, and write all training images.

    Every finished batch is kept in the folder, so that a build that was interrupted goes on.

    Args:
        context: of the attack.
        folder: where the set is written.
        recipe: what it depends on.
        network: the surrogate, as ``inference_copy`` returns it.
        normalization: of the surrogate's input.

    Raises:
        InputError: the rate leaves no image to poison.
        OSError: the folder cannot be written.
    """
    options, clean = context.options, context.dataset.train
    index = draw_poisoned_index(context, clean.labels == options.poison_target)
    pattern, mask = four_corner_checkerboard(*clean.images.shape[1:3])
    trigger = Trigger(pattern, mask, options.trigger_alpha, torch.tensor([options.poison_target]), index)
    if _read_recipe(folder) != recipe:  # else parts of the same set are there
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_json(folder / RECIPE, recipe)
    settings = options.clb_eps, options.clb_steps, options.clb_step_size, context.runtime.precision
    images = clean.images.clone()
    parts = [(folder / f"part_{number:04d}.npy", part) for number, part in enumerate(index.split(PGD_BATCH))]

    def perturb() -> Iterator[Tensor]:
        for path, part in parts:
            if not path.exists():
                for perturbed in pgd(network, clean[part], normalization, *settings):
                    yield perturbed
                _write_array(path, perturbed)
            perturbed = _read_array(path, (len(part), *clean.images.shape[1:])).to(images.device)
            images[part] = trigger.stamp(perturbed)

    done = options.clb_steps * sum(path.exists() for path, _ in parts)
    for _ in context.run.track(perturb(), options.clb_steps * len(parts), done, "clean-label set", "step"):
        pass
    _write_array(folder / IMAGES, images)
    _write_array(folder / LABELS, clean.labels)
    write_json(folder / RECIPE, {**recipe, "sha256": _digests(folder)})
    for path, _ in parts:
        path.unlink()
    announce(f"saved {folder}: {len(index)} images perturbed and stamped; use it again with --clb-dir")


def _write_array(path: Path, values: Tensor) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values.cpu().numpy())
    write_bytes(path, buffer.getvalue())


def _read_array(path: Path, shape: tuple[int, ...]) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, OverflowError, TokenError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: {error}; --clb-dir expects {IMAGES} and {LABELS}") from error
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype.kind not in "ui":
        raise InputError(f"{path}: expected one array of whole numbers of shape {shape}")
    if array.min() < 0 or array.max() > 255:
        raise InputError(f"{path}: values from {array.min()} to {array.max()}, expected 0 to 255")
    return torch.from_numpy(array.astype(np.uint8))


def read_clean_label_set(context: AttackContext, folder: Path) -> PoisonedSet:
    """Take the attacker's share of a clean-label set.

    The set holds all training images in the dataset's own order, the poisoned ones among them. The poisoned images
    are those whose pixels differ from the dataset's.

    Raises:
        InputError: a file is missing, damaged or of another size, its labels are not the dataset's, other images
            than the target's were changed, or the opacity is not the one it was built with.
    """
    recipe, alpha = _read_recipe(folder), context.options.trigger_alpha
    built_with = recipe.get("trigger_alpha")
    if None not in (alpha, built_with) and alpha != built_with:
        raise InputError(f"--trigger-alpha {alpha}: {folder / RECIPE} says {built_with}; leave the flag out")
    alpha = next(value for value in (alpha, built_with, 1.0) if value is not None)
    target, clean, train_index = target_class(context), context.dataset.train, context.train_index
    images = _read_array(folder / IMAGES, tuple(clean.images.shape))
    labels = _read_array(folder / LABELS, (len(clean),)).long()
    if not torch.equal(labels, clean.labels.cpu()):
        raise InputError(f"{folder / LABELS}: a clean-label set keeps the dataset's labels and order")
    train = ImageSet(images, labels).to(clean.images.device)[train_index]
    changed = (train.images != clean.images[train_index]).flatten(1).any(1).cpu()
    classes = labels[train_index[changed]].unique().tolist()
    if classes != [target]:
        raise InputError(
            f"{folder}: the changed images are of the classes {classes}, expected --poison-target {target} alone"
        )
    pattern, mask = four_corner_checkerboard(*clean.images.shape[1:3])
    trigger = Trigger(pattern, mask, alpha, torch.tensor([target]), train_index[changed])
    return PoisonedSet(train, trigger)
