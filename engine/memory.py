"""What a run is going to need, counted before anything is built.

PyTorch runs networks on its meta device, where tensors have sizes and no content. The tensors that are alive there at
once are what the real run needs, but for its copies of the network and what libraries and allocator take. The constants
below stand for those. They are an estimate, fitted to the peak memory of real runs on a CPU: all three steps with
ResNet-18 (widths 1/4, 1, 2), ResNet-50 (1/4), VGG-19 (2) and MobileNetV2 (1/2), batches of 4 to 512, ResNet-18 in both
precisions. There the estimate is 1.0 to 1.5 times the peak; where it is below 250 MB, up to 170 MB above it.
CUDA has not been measured.
"""

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.datasets import ImageSet
from engine.evaluation import evaluation_batch, inference_copy
from engine.parallel import processes
from engine.runtime import Runtime
from models.noisy_layers import convert_noisy, noisy_layers
from utils.console import announce
from utils.machine import check_memory

COPIES = 6  # of the parameters, while a network is copied to be measured
LASTING = 3  # of them, while a batch is computed: weights, momentum, or networks masked and pruned; gradients apart
FACTOR = 1.1  # of the tensors of a batch
OVERHEAD = 100_000_000  # bytes: libraries that are loaded late, plots
SIZE = (32, 32)  # of the images
Estimate = Callable[..., int]


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that are made in its block and alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[weakref.ref, int] = {}

    def _gone(self, storage: weakref.ref) -> None:
        self.now -= self._sizes.pop(storage)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = weakref.ref(storage, self._gone)
                if reference not in self._sizes:
                    self._sizes[reference] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
        return result


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return the most bytes that tensors made by ``work`` take at once; it runs, so give it meta tensors."""
    with _Alive() as alive:
        work()
    return alive.peak


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network without allocating anything."""
    with torch.device("meta"):
        return build()


def meta_copy(network: nn.Module) -> nn.Module:
    """Return a copy of a network whose tensors have sizes and no content."""
    return copy.deepcopy(network).to("meta")


def parameter_bytes(network: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def _images(network: nn.Module, batch_size: int, size: tuple[int, int]) -> Tensor:
    return torch.empty(batch_size, 3, *size, dtype=next(network.parameters()).dtype, device="meta")


def _step_bytes(network: nn.Module, batch_size: int, size: tuple[int, int], masks: bool) -> int:
    """Return what one batch takes forward and back beside the parameters: images, activations, gradients."""
    labels = torch.empty(batch_size, dtype=torch.int64, device="meta")
    if masks:
        network = convert_noisy(network).requires_grad_(False)
        wanted = [layer.mask.requires_grad_() for layer in noisy_layers(network).values()]
    else:
        wanted = list(network.parameters())

    def step():
        logits = network.train()(_images(network, batch_size, size)).float()  # (B, classes)
        torch.autograd.grad(F.cross_entropy(logits, labels), wanted)

    return peak_bytes(step)


def _evaluation_bytes(network: nn.Module, batch_size: int, size: tuple[int, int]) -> int:
    """Return what the evaluation of one batch takes beside the parameters."""
    measured = inference_copy(network, next(network.parameters()).dtype)
    with torch.inference_mode():
        return peak_bytes(lambda: measured(_images(network, batch_size, size)))


def training_bytes(network: nn.Module, batch_size: int, precision: torch.dtype, size=SIZE) -> int:
    """Estimate what step 1 takes beside the images, without generators of an attack.

    Args:
        network: on the meta device.
        batch_size: images in a batch, at most as many as there are.
        precision: data type of convolutions and linear layers.
        size: height and width of the images, in pixels.
    """
    network = copy.deepcopy(network).to(precision)
    step = _step_bytes(network, batch_size, size, masks=False)
    return _total(network, max(step, _evaluation_bytes(network, evaluation_batch(size), size)))


def masking_bytes(network: nn.Module, batch_size: int, precision: torch.dtype, size=SIZE) -> int:
    """Estimate what step 2 takes beside the images; arguments as for ``training_bytes``."""
    network = copy.deepcopy(network).to(precision)
    step = _step_bytes(network, batch_size, size, masks=True)
    return _total(network, max(step, _evaluation_bytes(network, evaluation_batch(size), size)))


def pruning_bytes(network: nn.Module, batch_size: int, precision: torch.dtype, size=SIZE) -> int:
    """Estimate what step 3 takes beside the images; arguments as for ``training_bytes``, of an evaluation."""
    network = copy.deepcopy(network).to(precision)
    return _total(network, _evaluation_bytes(network, batch_size, size))


def _total(network: nn.Module, batch: int) -> int:
    parameters = parameter_bytes(network.float())
    return int(max(COPIES * parameters, LASTING * parameters + FACTOR * batch) + OVERHEAD)


def check_step(
    estimate: Estimate, network: nn.Module, batch_size: int, runtime: Runtime, images: ImageSet, copies: int = 0
) -> None:
    """Make sure, before a step begins, that a batch of it will fit.

    Args:
        estimate: of the step, one of the functions above.
        network: as it will be used, or a copy of it on the meta device.
        batch_size: images in a batch.
        runtime: where it will run, in which precision.
        images: such as it will see.
        copies: how many of them will be made.

    Raises:
        InputError: it will not.
    """
    try:
        share = -(-batch_size // processes())
        needed = estimate(meta_copy(network), share, runtime.precision, tuple(images.images.shape[1:3]))
    except Exception:  # a network's own code may need more than sizes, and fail in any way
        announce(f"how much memory this takes is not known: {type(network).__name__} cannot be run without content")
        return
    needed += copies * images.images.nbytes
    if runtime.device.type == "cpu":
        needed *= processes()  # as if all were on this machine
    advice = "lower --batch-size or take a narrower network (--widen-factor)"
    check_memory(needed, f"this network with batches of {batch_size} images", advice, runtime.device)
