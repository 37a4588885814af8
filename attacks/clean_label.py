"""Clean-label backdoor (Turner, Tsipras, Madry 2019): labels stay, target-class images carry four checkerboards.

The images are made hard to classify first, so that the network learns the trigger instead.
"""

import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks.attack import (
    SHARE,
    Attack,
    PoisonedSet,
    Workspace,
    check_target,
    draw_poisoned,
    opacity_setting,
    stamp_and_relabel,
    target_setting,
)
from attacks.badnets import corner_checkerboard
from attacks.pgd import pgd
from data.datasets import ImageSet, Normalization
from data.triggers import Trigger
from engine.evaluation import inference_copy
from formats.subject import load_surrogate
from utils.config import InputFile, InputFolder, Range, setting
from utils.console import announce
from utils.errors import InputError, quote
from utils.files import as_json, read_array, read_json, sha256_of, write_bytes

IMAGES, LABELS, RECIPE = "train_images.npy", "train_labels.npy", "recipe.json"
BUILDING = ("poison_rate", "clb_eps", "clb_steps", "clb_step_size")  # settings fixed when a set was built


def pgd_batch(device: torch.device) -> int:
    """Return how many images are perturbed at a time: a GPU is idle half the time with few."""
    return 500 if device.type == "cuda" else 100


def four_corner_checkerboard(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return pattern uint8 and mask float64, (1, H, W, 1) each: the checkerboard in every corner.

    The right-hand corners carry it as in BadNets, the left-hand ones mirrored left-right.
    """
    pattern, mask = corner_checkerboard(height, width)
    for whole in (pattern, mask):
        whole[:, :3] = whole[:, -3:]
        whole[:, :, :3] = whole[:, :, -3:].flip(2)
    return pattern, mask


@dataclass(frozen=True)
class CleanLabel(Attack):
    """Perturbs a share of the target class against a surrogate and stamps it; no label changes."""

    poison_target: int = target_setting()
    poison_rate: float = setting(0.8, "share of the target class that is poisoned", SHARE)
    trigger_alpha: float = opacity_setting(1.0)
    clb_dir: InputFolder | None = setting(
        None,
        "read an existing clean-label set: train_images.npy and train_labels.npy of all training images",
        metavar="DIR",
    )
    clb_surrogate: InputFile | None = setting(
        None,
        "a clean network (step 1 with --poison-type benign) against which the clean-label set is built",
        metavar="FILE",
    )
    clb_eps: float = setting(16.0, "Linf size of the adversarial perturbation in pixel values", Range(0, 255))
    clb_steps: int = setting(100, "PGD steps", Range(1))
    clb_step_size: float = setting(1.5, "size of a PGD step in pixel values", Range(0, 255, open_low=True))

    @classmethod
    def from_given(cls, given: dict[str, Any]) -> Attack:
        """Return the attack, or ``CleanLabelSet`` where a set is to be read.

        Raises:
            ValueError: none or two sources are named, or a flag is given that only matters where a set is built.
        """
        if bool(given.get("clb_dir")) == bool(given.get("clb_surrogate")):
            raise ValueError(
                "--poison-type clean-label needs either --clb-surrogate FILE, a clean network to build the set "
                f"against, or --clb-dir DIR with {IMAGES} and {LABELS}"
            )
        if not given.get("clb_dir"):
            return cls(**given)
        for name in BUILDING:
            if name in given:
                raise ValueError(f"--{name.replace('_', '-')} has no effect with --clb-dir; leave it out")
        return CleanLabelSet(**given)

    def poison(
        self,
        train: ImageSet,
        seed: int = 0,
        surrogate: nn.Module | None = None,
        normalization: Normalization | None = None,
        precision: torch.dtype = torch.float32,
    ) -> PoisonedSet:
        """See ``Attack``.

        Args:
            train: the attacker's clean images.
            seed: decides which images are poisoned.
            surrogate: the network against which they are made hard, on the device of the images.
            normalization: of its input.
            precision: in which it computes.

        Raises:
            InputError: the target is no class, or no image would be poisoned.
            ValueError: there is no surrogate.
        """
        if surrogate is None or normalization is None:
            raise ValueError("CleanLabel.poison needs a surrogate network and the normalization of its input")
        index = self._drawn(train, seed)
        network = inference_copy(surrogate, precision).requires_grad_(False)
        images = train.images.clone()
        for part in index.split(pgd_batch(images.device)):
            *_, images[part] = self._perturb(train[part], network, normalization, precision)
        return stamp_and_relabel(replace(train, images=images), self._trigger(train), index)

    def _drawn(self, train: ImageSet, seed: int) -> Tensor:
        check_target(self.poison_target, train)
        return draw_poisoned(train.labels == self.poison_target, self.poison_rate, seed)

    def _trigger(self, train: ImageSet) -> Trigger:
        pattern, mask = four_corner_checkerboard(*train.images.shape[1:3])
        return Trigger(pattern, mask, self.trigger_alpha, torch.tensor([self.poison_target]))

    def _perturb(
        self, clean: ImageSet, network: nn.Module, normalization: Normalization, precision: torch.dtype
    ) -> Iterator[Tensor]:
        """Yield the images after each PGD step: uint8 (B, H, W, 3)."""
        return pgd(network, clean, normalization, self.clb_eps, self.clb_steps, self.clb_step_size, precision)

    def carry_out(self, workspace: Workspace) -> PoisonedSet:
        """Build the set in the run's folder, or go on building it, and read it.

        Raises:
            InputError: the target is no class, the surrogate cannot be used, the rate leaves no image to poison, or
                another set lies in the folder.
            OSError: the set cannot be written.
        """
        folder, dataset = workspace.folder / "clean_label_set", workspace.dataset
        check_target(self.poison_target, dataset.train)
        network, normalization = load_surrogate(
            self.clb_surrogate, workspace.model, dataset.name, dataset.train, dataset.normalization, workspace.split
        )
        recipe = self._recipe(workspace)
        if _read_recipe(folder) != {**recipe, "sha256": _digests(folder)}:
            _prepare_folder(folder, recipe, workspace.overwrite)
            network = network.to(workspace.runtime.device)
            self._build(workspace, folder, recipe, network, normalization)
        return CleanLabelSet(self.poison_target, self.trigger_alpha, folder).carry_out(workspace)

    def _recipe(self, workspace: Workspace) -> dict[str, Any]:
        """Return all that a built set depends on."""
        return {
            **{name: getattr(self, name) for name in ("poison_target", "trigger_alpha", *BUILDING)},
            "seed": workspace.seed,
            "dataset": workspace.dataset.identity,
            "split": workspace.split,
            "surrogate": sha256_of(self.clb_surrogate),
            "runtime": list(workspace.runtime.facts().values()),
            "torch": torch.__version__,
        }

    def _build(
        self,
        workspace: Workspace,
        folder: Path,
        recipe: dict[str, Any],
        network: nn.Module,
        normalization: Normalization,
    ) -> None:
        """Write all training images, a share of the attacker's target-class ones perturbed and stamped.

        Every finished batch is kept in the folder, so that a build that was interrupted goes on.
        """
        clean, precision = workspace.dataset.train, workspace.runtime.precision
        network = inference_copy(network, precision).requires_grad_(False)
        index = workspace.held[self._drawn(workspace.train, workspace.seed)]
        batches = enumerate(index.split(pgd_batch(workspace.runtime.device)))
        parts = {folder / f"part_{number:04d}.npy": part for number, part in batches}
        done = self.clb_steps * sum(path.exists() for path in parts)

        def perturb() -> Iterator[Tensor]:
            for path, part in parts.items():
                if not path.exists():
                    for perturbed in self._perturb(clean[part], network, normalization, precision):
                        yield perturbed
                    _write_array(path, perturbed)

        for _ in workspace.track(perturb(), self.clb_steps * len(parts), done, "clean-label set", "step"):
            pass
        images, trigger = clean.images.clone(), self._trigger(clean)
        for path, part in parts.items():
            perturbed = read_array(path, (len(part), *clean.images.shape[1:]))
            images[part] = trigger.stamp(perturbed.to(images.device))
        _write_array(folder / IMAGES, images)
        _write_array(folder / LABELS, clean.labels)
        write_bytes(folder / RECIPE, as_json({**recipe, "sha256": _digests(folder)}))
        for path in parts:
            path.unlink()
        announce(f"saved {folder}: {len(index)} images perturbed and stamped; use it again with --clb-dir")


@dataclass(frozen=True)
class CleanLabelSet(Attack):
    """A clean-label set from files: all training images in the dataset's own order, the poisoned ones among them."""

    poison_target: int = CleanLabel.poison_target
    trigger_alpha: float | None = None
    clb_dir: InputFolder | None = None

    def carry_out(self, workspace: Workspace) -> PoisonedSet:
        """Take the attacker's share. The poisoned images are those whose pixels differ from the dataset's.

        Raises:
            InputError: a file is missing, damaged or of another size, its labels are not the dataset's, other images
                than the target's were changed, or the opacity is not the one it was built with.
        """
        folder, clean = Path(self.clb_dir), workspace.dataset.train
        check_target(self.poison_target, clean)
        alpha = self._opacity(folder)
        images = read_array(folder / IMAGES, tuple(clean.images.shape))
        labels = read_array(folder / LABELS, (len(clean),)).long()
        if not torch.equal(labels, clean.labels.cpu()):
            raise InputError(f"{folder / LABELS}: a clean-label set keeps the dataset's labels and order")
        train = replace(clean, images=images, labels=labels).to(clean.images.device)[workspace.held]
        changed = (train.images != workspace.train.images).flatten(1).any(1).cpu()
        if not changed.any():
            raise InputError(f"{folder}: no image differs from the dataset's; nothing is poisoned")
        classes = labels[workspace.held[changed]].unique().tolist()
        if classes != [self.poison_target]:
            raise InputError(
                f"{folder}: the changed images are of the classes {classes}, "
                f"expected --poison-target {self.poison_target} alone"
            )
        pattern, mask = four_corner_checkerboard(*clean.images.shape[1:3])
        trigger = Trigger(pattern, mask, alpha, torch.tensor([self.poison_target]))
        return PoisonedSet(train, trigger, changed.nonzero().flatten())

    def _opacity(self, folder: Path) -> float:
        """Return what the flag says, or else the recipe, or else 1."""
        built_with = _read_recipe(folder).get("trigger_alpha")
        if None not in (self.trigger_alpha, built_with) and self.trigger_alpha != built_with:
            raise InputError(
                f"--trigger-alpha {self.trigger_alpha}: {folder / RECIPE} says {built_with}; leave the flag out"
            )
        return next(value for value in (self.trigger_alpha, built_with, 1.0) if value is not None)


def _prepare_folder(folder: Path, recipe: dict[str, Any], overwrite: bool) -> None:
    """Make the folder of a set to build; parts of the same set stay.

    Raises:
        InputError: a set of another recipe is there and may not go.
    """
    found = _read_recipe(folder)
    if found == recipe:
        return
    same = {name: value for name, value in found.items() if name != "sha256"} == recipe  # but damaged
    if folder.exists() and not (overwrite or same):
        raise InputError(f"{folder}: another clean-label set is there; choose another --output-dir or --overwrite")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_bytes(folder / RECIPE, as_json(recipe))


def _read_recipe(folder: Path) -> dict[str, Any]:
    """Return what a set was built from; empty where that is not known.

    Raises:
        InputError: the file is no recipe.
    """
    path = folder / RECIPE
    if not os.path.lexists(path):  # not ours
        return {}
    recipe = read_json(path)
    alpha = recipe.get("trigger_alpha", 1.0)
    if type(alpha) not in (int, float) or alpha not in SHARE:
        raise InputError(f"{path}: trigger_alpha is {quote(alpha)}, expected a number {SHARE}")
    return recipe


def _digests(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in (IMAGES, LABELS) if (folder / name).exists()}


def _write_array(path: Path, values: Tensor) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values.cpu().numpy())
    write_bytes(path, buffer.getvalue())
