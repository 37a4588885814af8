"""Patches that stand in for a trigger nobody knows: one of bounded size is learnt for each class.

A patch replaces, as Neural Cleanse's does (Wang et al., *Neural Cleanse: Identifying and Mitigating Backdoor Attacks in
Neural Networks*, IEEE S&P 2019, section IV), x by (1 - m) * x + m * p. Here the sum of m is bounded instead of
minimised, so that patches of different classes can be compared by how many images they move. Such a patch may be asked
to fail on a second network; what is left is the part of its force that lies in the difference of the two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import normalize
from data.datasets import Normalization
from defenses.defense import BATCH, CleanImages
from engine.runtime import autocast
from utils.config import Config, Range, setting
from utils.errors import InputError
from utils.seeding import seeded_generator

FIRST_PRICE, PRICE_STEP = 0.05, 1.05
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PatchConfig(Config):
    """Settings of the patches.

    Raises:
        ValueError: a setting is out of range.
    """

    patch_share: float = setting(
        1 / 64, "largest sum of a patch's mask, as a share of the pixels", Range(0, 1, open_low=True)
    )
    patch_steps: int = setting(200, "updates of a patch", Range(1, 1e6))
    patch_images: int = setting(16, "images in an update", Range(1, 1e6))
    patch_rate: float = setting(0.1, "learning rate of the patches", Range(0, open_low=True))
    patch_seed: int = setting(0, "decides where patches begin and which images they see", Range(0))


@dataclass(frozen=True)
class Patches:
    """A patch for each of some classes.

    Attributes:
        targets: int64 (T,), the classes.
        masks: float32 (T, H, W, 1), 0..1; how much of each pixel is replaced.
        patterns: float32 (T, H, W, 3), 0..1; what by.
    """

    targets: Tensor
    masks: Tensor
    patterns: Tensor

    def on(self, images: Tensor) -> Tensor:
        """Put each patch on images of its own: (T, B, H, W, 3), or on the same: (B, H, W, 3), to (T, B, H, W, 3)."""
        masks, patterns = self.masks[:, None], self.patterns[:, None]
        return (1 - masks) * images + masks * patterns

    @torch.no_grad()
    def reached(self, logits_of: Logits, images: Tensor, labels: Tensor) -> Tensor:
        """Return the share of images of other classes that each patch sends to its class: float32 (T,), 0..1.

        Args:
            logits_of: images (B, H, W, 3), 0..1, to logits (B, K).
            images: float32 (N, H, W, 3), 0..1.
            labels: int64 (N,).

        Raises:
            InputError: all images are of one of the classes.
        """
        shares = []
        for number, target in enumerate(self.targets.tolist()):
            others = images[labels != target]
            if not len(others):
                raise InputError(f"no clean image of another class than {target}: nothing can be sent there")
            one = Patches(*(each[number : number + 1] for each in (self.targets, self.masks, self.patterns)))
            hits = [(logits_of(one.on(part)[0]).argmax(1) == target).float().sum() for part in others.split(BATCH)]
            shares.append(torch.stack(hits).sum() / len(others))
        return torch.stack(shares).cpu()


def pixels_of(clean: CleanImages, normalization: Normalization) -> Tensor:
    """Return clean images as pixels, whatever a network takes: float32 (N, H, W, 3), 0..1.

    Args:
        clean: the images.
        normalization: of the network's input.

    Raises:
        InputError: they are no images of three channels.
    """
    inputs = torch.cat([inputs for inputs, _ in clean.batches()])
    if inputs.dim() != 4 or inputs.shape[1] != 3:
        raise InputError(f"a patch needs images (N, 3, H, W), got {tuple(inputs.shape)}")
    inputs = inputs.permute(0, 2, 3, 1).float()  # (N, H, W, 3)
    mean, std = (torch.tensor(part, device=inputs.device) for part in (normalization.mean, normalization.std))
    return (inputs * std + mean).clamp(0, 1)


def logits_of_pixels(network: nn.Module, normalization: Normalization, precision: torch.dtype) -> Logits:
    """Return a network as a function from images (B, H, W, 3), 0..1, to float32 logits (B, K)."""

    def logits_of(images: Tensor) -> Tensor:
        with autocast(images.device, precision):
            return network(normalize(255 * images, normalization)).float()

    return logits_of


def _bounded(mask: Tensor, area: float) -> Tensor:
    """Scale masks (T, H, W, 1) down to a sum of ``area`` where it is larger."""
    return mask * (area / mask.sum((1, 2, 3), keepdim=True)).clamp_max(1)


def _draw(places: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` of each of some sets of places, with replacement: int64 (len(places), count)."""
    draws = torch.rand(len(places), count, generator=generator)
    return torch.stack([each[(draw * len(each)).long()] for each, draw in zip(places, draws, strict=True)])


@torch.inference_mode(False)
@torch.enable_grad()
def learn_patches(
    logits_of: Logits,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    config: PatchConfig,
    avoid: Logits | None = None,
) -> Patches:
    """Learn a patch for each of some classes that sends images of other classes there.

    Args:
        logits_of: images (B, H, W, 3), 0..1, to logits (B, K), of a network that is not trained.
        images: float32 (N, H, W, 3), 0..1.
        labels: int64 (N,).
        targets: int64 (T,), the classes.
        config: the settings.
        avoid: another network, which should go on to give the true labels; None: there is none.

    Raises:
        InputError: all images are of one of the classes.
    """
    generator = seeded_generator(config.patch_seed, "patches")
    _, height, width, _ = images.shape
    area = config.patch_share * height * width
    start = torch.randn(len(targets), height, width, 4, generator=generator) * 0.1
    free = (start - torch.tensor([2.0, 0, 0, 0])).to(images.device).requires_grad_()  # before the sigmoid
    optimizer = torch.optim.Adam([free], lr=config.patch_rate)
    others = [(labels != target).nonzero()[:, 0] for target in targets.tolist()]
    if not all(map(len, others)):
        raise InputError("all clean images are of one class: nothing can be sent there")

    def patches() -> Patches:
        values = free.sigmoid()
        return Patches(targets, values[..., :1], values[..., 1:])

    price = torch.full((len(targets),), FIRST_PRICE, device=images.device)  # of a pixel, in nats
    wanted = targets.to(images.device).repeat_interleave(config.patch_images)  # (T * B,)
    for _ in range(config.patch_steps):
        index = _draw(others, config.patch_images, generator)  # (T, B)
        current = patches()
        seen = current.on(images[index]).flatten(0, 1)  # (T * B, H, W, 3)
        sizes = current.masks.sum((1, 2, 3))  # (T,)
        loss = F.cross_entropy(logits_of(seen), wanted, reduction="sum")
        if avoid is not None:
            loss = loss + F.cross_entropy(avoid(seen), labels[index].flatten(), reduction="sum")
        loss = loss / config.patch_images + (price * sizes).sum()  # each patch has its own share of it
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        price = price * torch.where(sizes > area, PRICE_STEP, 1 / PRICE_STEP)
    with torch.no_grad():
        found = patches()
        return Patches(targets, _bounded(found.masks, area), found.patterns)
