"""The three steps written the plain way: slow, obvious, the reference for speed and for numbers.

fp32, NCHW, per-image torchvision transforms in a DataLoader without workers, gradients for every parameter.
"""

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from data.datasets import ImageSet, Normalization
from defenses.anp import AnpConfig


class _Images(Dataset):
    def __init__(self, images: ImageSet, transform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images.images[index].numpy()), int(self.images.labels[index])


def plain_loader(
    images: ImageSet, normalization: Normalization, train: bool, batch_size: int = 128, endless: bool = False
) -> DataLoader:
    """Return a DataLoader of float (B, 3, H, W) and int64 (B,), augmented and shuffled if ``train``.

    ``endless`` draws the images with replacement instead, as step 2 does.
    """
    size = list(images.images.shape[1:3])
    augmentation = [transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip()] if train else []
    steps = [transforms.ToPILImage(), *augmentation, transforms.ToTensor()]
    steps.append(transforms.Normalize(normalization.mean, normalization.std))
    images = _Images(images, transforms.Compose(steps))
    if endless:
        return DataLoader(images, batch_size, sampler=RandomSampler(images, replacement=True, num_samples=10**9))
    return DataLoader(images, batch_size, shuffle=train)


def plain_train(network: nn.Module, batches: Iterable, lr: float = 0.1) -> None:
    """Step 1: one SGD update for each batch."""
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    network.train()
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()


class PlainNoisyBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with a mask and two noises for each channel, all of them parameters."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__(norm.num_features, norm.eps)
        self.load_state_dict(norm.state_dict())
        self.to(norm.weight.device)
        self.neuron_mask = nn.Parameter(torch.ones_like(norm.weight))
        self.neuron_noise = nn.Parameter(torch.zeros_like(norm.weight))
        self.neuron_noise_bias = nn.Parameter(torch.zeros_like(norm.weight))
        self.perturbed = False

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight * self.neuron_mask, self.bias
        if self.perturbed:
            weight = self.weight * (self.neuron_mask + self.neuron_noise)
            bias = self.bias * (1 + self.neuron_noise_bias)
        return F.batch_norm(x, self.running_mean.clone(), self.running_var.clone(), weight, bias, True, 0.1, self.eps)


class PlainMasks:
    """Step 2 on a ``torch.optim.SGD`` over one parameter a layer.

    Args:
        network: copied; its BatchNorm2d layers are replaced in the copy.
        config: the settings; always fp32.
    """

    def __init__(self, network: nn.Module, config: AnpConfig):
        self.network, self.config = copy.deepcopy(network), config
        self.layers = {}
        for name, norm in list(self.network.named_modules()):
            if isinstance(norm, nn.BatchNorm2d):
                parent = self.network.get_submodule(name.rpartition(".")[0])
                self.layers[name] = PlainNoisyBatchNorm2d(norm)
                setattr(parent, name.rpartition(".")[2], self.layers[name])
        masks = [layer.neuron_mask for layer in self.layers.values()]
        self.optimizer = torch.optim.SGD(masks, config.lr, momentum=config.momentum)

    def _loss(self, images: Tensor, labels: Tensor, perturbed: bool) -> Tensor:
        for layer in self.layers.values():
            layer.perturbed = perturbed
        return F.cross_entropy(self.network(images), labels)

    def _start_noise(self, noise: tuple[Tensor, Tensor]) -> None:
        sizes = [layer.num_features for layer in self.layers.values()]
        for layer, d, x in zip(self.layers.values(), noise[0].split(sizes), noise[1].split(sizes), strict=True):
            layer.neuron_noise.data.copy_(d)
            layer.neuron_noise_bias.data.copy_(x)

    def iterate(self, images: Tensor, labels: Tensor, noise: tuple[Tensor, Tensor]) -> float:
        """Make one update from a batch and the start of the perturbation; return its loss."""
        eps, alpha, steps = self.config.eps, self.config.alpha, self.config.steps
        self._start_noise(noise)
        for _ in range(steps):
            self.network.zero_grad()
            self._loss(images, labels, True).backward()
            for layer in self.layers.values():
                for part in (layer.neuron_noise, layer.neuron_noise_bias):
                    part.data += eps / steps * part.grad.sign()
                    if self.config.project:
                        part.data.clamp_(-eps, eps)
        self.network.zero_grad()
        loss = alpha * self._loss(images, labels, False) + (1 - alpha) * self._loss(images, labels, True)
        loss.backward()
        self.optimizer.step()
        for layer in self.layers.values():
            layer.neuron_mask.data.clamp_(0, 1)
        return loss.item()

    def mask(self) -> Tensor:
        """Return all masks: float32 (n,), in state_dict order."""
        return torch.cat([layer.neuron_mask.detach() for layer in self.layers.values()])


@torch.no_grad()
def plain_evaluate(network: nn.Module, loader: Iterable) -> tuple[float, float]:
    """Step 3: return mean loss and accuracy, 0..1."""
    network.eval()
    loss, correct, count = 0.0, 0, 0
    for images, labels in loader:
        logits = network(images)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        correct += (logits.argmax(1) == labels).sum().item()
        count += len(labels)
    return loss / count, correct / count
