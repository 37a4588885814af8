"""Clean-label backdoor (Turner, Tsipras, Madry 2019): labels stay, target-class images carry four checkerboards."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.attacks.attack import AttackConfig, PoisonedSet
from data.attacks.badnets import corner_checkerboard
from data.datasets import ImageSet
from data.errors import InputError
from data.triggers import Trigger


def four_corner_checkerboard(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return pattern uint8 and mask float64, (1, H, W, 1) each: the checkerboard in every corner.

    The right-hand corners carry it as in BadNets, the left-hand ones mirrored left-right.
    """
    pattern, mask = corner_checkerboard(height, width)
    for whole in (pattern, mask):
        whole[:, :3] = whole[:, -3:]
        whole[:, :, :3] = whole[:, :, -3:].flip(2)
    return pattern, mask


def _read_array(path: Path, shape: tuple[int, ...]) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: {error}; --clb-dir expects train_images.npy and train_labels.npy") from error
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype.kind not in "ui":
        raise InputError(f"{path}: expected one array of whole numbers of shape {shape}")
    if array.min() < 0 or array.max() > 255:
        raise InputError(f"{path}: values from {array.min()} to {array.max()}, expected 0 to 255")
    return torch.from_numpy(array.astype(np.uint8))


def clean_label(full_train: ImageSet, train_index: Tensor, config: AttackConfig) -> PoisonedSet:
    """Take the attacker's share of a published clean-label set; arguments as in ``Attack.poison``.

    The set holds all training images in the dataset's own order, the poisoned ones among them. The poisoned images
    are those whose pixels differ from the dataset's.

    Raises:
        InputError: a file is missing, damaged or of another size, its labels are not the dataset's, or other images
            than the target's were changed.
    """
    folder = Path(config.folder)
    images = _read_array(folder / "train_images.npy", tuple(full_train.images.shape))
    labels = _read_array(folder / "train_labels.npy", (len(full_train),)).long()
    if not torch.equal(labels, full_train.labels.cpu()):
        raise InputError(f"{folder / 'train_labels.npy'}: a clean-label set keeps the dataset's labels and order")
    train = ImageSet(images, labels).to(full_train.images.device)[train_index]
    changed = (train.images != full_train.images[train_index]).flatten(1).any(1).cpu()
    classes = labels[train_index[changed]].unique().tolist()
    if classes != [config.target]:
        raise InputError(
            f"{folder}: the changed images are of the classes {classes}, expected --poison-target {config.target} alone"
        )
    pattern, mask = four_corner_checkerboard(*full_train.images.shape[1:3])
    trigger = Trigger(pattern, mask, config.alpha, torch.tensor([config.target]), train_index[changed])
    return PoisonedSet(train, trigger)
