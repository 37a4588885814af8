"""Triggers that generators draw, one for each image (Nguyen & Tran, NeurIPS 2020)."""

import torch
from torch import Tensor, nn

from data.augment import normalize
from data.datasets import ImageSet, Normalization
from data.triggers import Trigger
from engine.evaluation import evaluation_batch, inference_copy
from models.generator import mask_of, pattern_of


@torch.inference_mode()
def drawn_trigger(
    pattern_net: nn.Module,
    mask_net: nn.Module,
    images: ImageSet,
    targets: Tensor,
    normalization: Normalization,
    precision: torch.dtype,
) -> Trigger:
    """Return one pattern and one mask for each image.

    Args:
        pattern_net, mask_net: generators, ``models.generator.Generator``; left in eval mode.
        images: for which to draw.
        targets: int64 (N,); the attacker's class of each.
        normalization: of the generators' input.
        precision: data type in which they compute.
    """
    nets, parts = [inference_copy(net, precision) for net in (pattern_net, mask_net)], []
    for batch in images.images.split(evaluation_batch(images.images.shape[1:3])):
        inputs = normalize(batch, normalization).to(precision)
        pattern, mask = (net(inputs).float().permute(0, 2, 3, 1).cpu() for net in nets)  # (B, H, W, 3 and 1)
        parts.append(((pattern_of(pattern) * 255).round().to(torch.uint8), mask_of(mask)))
    patterns, masks = (torch.cat(part) for part in zip(*parts, strict=True))
    return Trigger(patterns, masks, 1.0, targets.cpu())
