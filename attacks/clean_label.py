"""Clean-label backdoor (Turner, Tsipras, Madry 2019): labels stay, target-class images carry four checkerboards.

The images are made hard to classify first, so that the network learns the trigger instead.
"""

import io
import json
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attacks.attack import AttackContext, PoisonedSet, draw_poisoned_index, target_class
from attacks.badnets import corner_checkerboard
from attacks.pgd import pgd
from data.datasets import ImageSet
from data.errors import InputError
from data.split import permutation_digest
from data.triggers import Trigger
from utils.evaluation import inference_copy
from utils.files import sha256_of, write_bytes, write_json
from utils.run import announce
from utils.subject import load_surrogate

IMAGES, LABELS, RECIPE = "train_images.npy", "train_labels.npy", "recipe.json"
PGD_BATCH = 100  # images perturbed at a time


def check_clean_label(options: Namespace) -> None:
    """Raise ``ValueError`` unless one source is named, and where flags would not matter."""
    if bool(options.clb_dir) == bool(options.clb_surrogate):
        raise ValueError(
            "--poison-type clean-label needs either --clb-surrogate FILE, a clean network to build the set against, or "
            f"--clb-dir DIR with {IMAGES} and {LABELS}"
        )
    for name in ("poison_rate", "trigger_alpha", "clb_eps", "clb_steps", "clb_step_size"):
        if options.clb_dir and getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no effect with --clb-dir; leave it out")


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
    """
    folder = Path(context.options.clb_dir or context.run.folder / "clean_label_set")
    if not context.options.clb_dir:
        recipe = _recipe(context)
        if not _is_there(folder, recipe):
            build_clean_label_set(context, folder, recipe)
    return read_clean_label_set(context, folder)


def _recipe(context: AttackContext) -> dict[str, Any]:
    """Return all that a built set depends on."""
    names = ("poison_target", "poison_rate", "trigger_alpha", "clb_eps", "clb_steps", "clb_step_size", "seed")
    return {
        **{name: getattr(context.options, name) for name in names},
        "dataset": context.dataset.name,
        "split": permutation_digest(context.permutation),
        "surrogate": sha256_of(context.options.clb_surrogate),
        "runtime": [str(context.runtime.device), str(context.runtime.precision), torch.get_num_threads()],
    }


def _is_there(folder: Path, recipe: dict[str, Any]) -> bool:
    """Say whether a set of the same recipe was built before, as when a training is resumed."""
    if not (folder / RECIPE).exists():
        return False
    digests = {name: sha256_of(folder / name) for name in (IMAGES, LABELS) if (folder / name).exists()}
    return json.loads((folder / RECIPE).read_text()) == {**recipe, "sha256": digests}


def build_clean_label_set(context: AttackContext, folder: Path, recipe: dict[str, Any]) -> None:
    """Perturb and stamp a share of the attacker's target-class images, and write all training images.

    Raises:
        InputError: as ``poison_clean_label``.
    """
    options, dataset = context.options, context.dataset
    target = target_class(context)
    network, normalization = load_surrogate(options.clb_surrogate, options, dataset, context.permutation)
    network = inference_copy(network.to(context.runtime.device), context.runtime.precision).requires_grad_(False)
    index = draw_poisoned_index(context, dataset.train.labels == target)
    trigger = Trigger(
        *four_corner_checkerboard(*dataset.train.images.shape[1:3]),
        options.trigger_alpha,
        torch.tensor([target]),
        index,
    )
    images = dataset.train.images.clone()

    def perturb():
        for part in index.split(PGD_BATCH):
            settings = (options.clb_eps, options.clb_steps, options.clb_step_size, context.runtime.precision)
            images[part] = trigger.stamp(pgd(network, dataset.train[part], normalization, *settings))
            yield part

    for _ in context.run.track(perturb(), -(-len(index) // PGD_BATCH), 0, "clean-label set", "batch"):
        pass
    folder.mkdir(exist_ok=True)
    (folder / RECIPE).unlink(missing_ok=True)
    _write_array(folder / IMAGES, images)
    _write_array(folder / LABELS, dataset.train.labels)
    digests = {name: sha256_of(folder / name) for name in (IMAGES, LABELS)}
    write_json(folder / RECIPE, {**recipe, "sha256": digests})
    announce(f"saved {folder}: {len(index)} images of class {target} perturbed and stamped; use again with --clb-dir")


def _write_array(path: Path, values: Tensor) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values.cpu().numpy())
    write_bytes(path, buffer.getvalue())


def _read_array(path: Path, shape: tuple[int, ...]) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
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
        InputError: a file is missing, damaged or of another size, its labels are not the dataset's, or other images
            than the target's were changed.
    """
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
    trigger = Trigger(pattern, mask, context.options.trigger_alpha, torch.tensor([target]), train_index[changed])
    return PoisonedSet(train, trigger)
