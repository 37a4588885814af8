"""Untargeted projected gradient descent (Madry et al. 2018), which makes the clean-label attack's images hard."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import normalize
from data.datasets import ImageSet, Normalization


def pgd(
    network: nn.Module,
    clean: ImageSet,
    normalization: Normalization,
    eps: float,
    steps: int,
    step_size: float,
    precision: torch.dtype,
) -> Iterator[Tensor]:
    """Raise the cross entropy inside the Linf ball: sign steps from the image itself, no random start.

    x <- clip(x + step_size * sign(dCE/dx)), projected to |x - clean| <= eps and to 0..255 (Turner, Tsipras, Madry
    2019, section 4.2; there on the 0..1 scale).

    Args:
        network: the surrogate, as ``inference_copy`` returns it.
        clean: the images and their true labels.
        normalization: of the surrogate's input.
        eps, step_size: on the 0..255 scale.
        steps: 1 or more.
        precision: data type in which the surrogate computes; the images stay float32.

    Yields:
        The images after each step, truncated: uint8 (B, H, W, 3), 0..255.
    """
    start = clean.images.float()
    low, high = (start - eps).clamp(min=0).ceil(), (start + eps).clamp(max=255)  # whole, as truncation goes down
    images = start.clone()
    for _ in range(steps):
        images.requires_grad_()
        logits = network(normalize(images, normalization).to(precision))
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), clean.labels, reduction="sum"), images)
        images = (images.detach() + step_size * gradient.sign()).clamp(low, high)
        yield images.to(torch.uint8)
