"""Untargeted projected gradient descent (Madry et al. 2018), which makes the clean-label attack's images hard."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.datasets import ImageSet, Normalization


def pgd(
    network: nn.Module,
    clean: ImageSet,
    normalization: Normalization,
    eps: float,
    steps: int,
    step_size: float,
    precision: torch.dtype,
) -> Tensor:
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

    Shape:
        uint8 (B, H, W, 3) -> uint8 (B, H, W, 3), truncated.
    """
    device = clean.images.device
    mean, std = (torch.tensor(part, device=device) * 255 for part in (normalization.mean, normalization.std))
    start = clean.images.float()
    low, high = (start - eps).clamp(min=0), (start + eps).clamp(max=255)
    images = start.clone()
    for _ in range(steps):
        images.requires_grad_()
        logits = network(((images - mean) / std).permute(0, 3, 1, 2).to(precision))
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits.float(), clean.labels, reduction="sum"), images)
        images = (images.detach() + step_size * gradient.sign()).clamp(low, high)
    return images.to(torch.uint8)
