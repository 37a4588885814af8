"""One training in several processes that torchrun starts, with the batches and the updates of a single process.

The first process is the run: it alone knows flags, folder and test set, and writes and prints. The others are sent what
to train, take their share of every batch, and end with the first one.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from data.datasets import ImageSet, Normalization
from engine.runtime import RuntimeConfig, autocast, prepare_runtime
from engine.training import SgdLoop, TrainConfig, TrainingLoop
from models import ModelConfig
from utils.console import announce
from utils.errors import InputError, shorten
from utils.guard import guard
from utils.signals import ignore_all

PATIENCE = timedelta(days=7)  # of those who wait while the first process builds a set or measures
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class ProcessLost(InputError):
    """Another process of this training has ended."""


@dataclass(frozen=True)
class _Task:
    """What the first process sends the others; ``train`` is on the CPU."""

    model: ModelConfig
    train: ImageSet
    normalization: Normalization
    flip: bool
    config: TrainConfig
    device: str  # its type
    threads: int


def join() -> int:
    """Meet the processes that torchrun started, if it did.

    Returns:
        This one's number, 0 for the first, or where it is alone.

    Raises:
        SystemExit: they cannot meet, which was said.
    """
    several = dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1
    if not several:
        return 0
    if status := guard(_meet, "torchrun"):
        raise SystemExit(status)
    return dist.get_rank()


def _meet() -> None:
    """Open the group of all processes; raises ``InputError`` where it cannot be opened."""
    try:
        dist.init_process_group("gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = shorten(str(error).partition("\n")[0])
        raise InputError(f"the processes cannot meet ({reason}); look at the flags of torchrun") from error


def processes() -> int:
    """Return how many processes train together, 1 where this one is alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def spread(loop: TrainingLoop, model: ModelConfig) -> TrainingLoop:
    """Return the training that all processes carry out together, or ``loop`` itself where this one is alone.

    Args:
        loop: in the first process, at its beginning.
        model: what its network is.

    Raises:
        InputError: it cannot be carried out by several processes, one of them has no GPU to itself, or has ended.
    """
    if processes() == 1:
        return loop
    if type(loop) is not SgdLoop:
        raise InputError("input-aware attacks train generators with the network, in one process: leave out torchrun")
    _check_devices(loop.device)
    _check_norms(loop.network)
    announce(f"{processes()} processes, each with its share of every batch")
    threads, flip, device = torch.get_num_threads(), loop.flip, loop.device.type
    with _together():
        _send(_Task(model, loop.train.to("cpu"), loop.normalization, flip, loop.config, device, threads))
        return ParallelLoop(loop.network, loop.train, loop.normalization, flip, loop.config)


def follow() -> int:
    """Carry out the share of a process that is not the first; returns the exit status.

    It is 0 also where the first process has ended, which says itself why. Signals are left to that one, too: it may
    need this process to finish an update.
    """
    ignore_all()
    return guard(_follow, f"process {dist.get_rank()}")


def _follow() -> None:
    try:
        with _together():
            task = _receive()
        name = "cpu" if task.device == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}"
        device = prepare_runtime(RuntimeConfig(name, "fp32", task.threads)).device  # the precision is in the task
        network = task.model.build(task.train.num_classes).to(device, memory_format=torch.channels_last)
        with _together():
            loop = ParallelLoop(network, task.train.to(device), task.normalization, task.flip, task.config)
        for _ in loop.steps():
            pass
    except ProcessLost:
        return


def _check_devices(device: torch.device) -> None:
    """Raise ``InputError`` where not every process of this machine has a GPU to itself."""
    if device.type == "cpu":
        return
    count, there = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device.index != 0:
        raise InputError(f"--device {device}: the processes of torchrun take cuda:0 and on; name none, or cuda")
    if count > there:
        raise InputError(f"{count} processes but {there} CUDA devices; start fewer: torchrun --nproc-per-node {there}")


def _check_norms(network: nn.Module) -> None:
    """Raise ``InputError`` where a BatchNorm would see the share of one process only."""
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and type(module) not in _PLAIN:
            kind = type(module).__name__
            raise InputError(f"{name}: {kind} cannot be computed by several processes; leave out torchrun")


@contextmanager
def _together() -> Iterator[None]:
    """Do what needs all processes in the block.

    Raises:
        ProcessLost: one of them has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        ignore_all()  # torchrun ends all that are left, and what is in memory is no state to save
        raise ProcessLost("another process of this training has ended; continue with --resume") from error


def _send(content: Any) -> None:
    dist.broadcast_object_list([content])


def _receive() -> Any:
    received = [None]
    dist.broadcast_object_list(received)
    return received[0]


class ParallelLoop(SgdLoop):
    """``SgdLoop`` in several processes: each computes its share of a batch, all make the same update.

    Order and augmentation are those of the whole batch, and so are the statistics of BatchNorms and the mean loss, with
    any number of images in the batch. Sums are taken in another order than in one process, and so differ by rounding.
    Arguments as for ``TrainingLoop``, the same in every process; all of them have to be made together.
    """

    def __init__(
        self, network: nn.Module, train: ImageSet, normalization: Normalization, flip: bool, config: TrainConfig
    ):
        super().__init__(network, train, normalization, flip, config)
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        # Objects and signs of life go over gloo, so that a process which has ended is noticed at once.
        self._group = dist.new_group(backend="nccl", timeout=PATIENCE) if self.device.type == "cuda" else None
        same = synchronised(network, self._group)
        # A static graph: else a network with weights that it does not use would stop at its second batch.
        self._shared = DistributedDataParallel(same, process_group=self._group, static_graph=True)

    def steps(self) -> Iterator[int]:
        """See ``engine.drive.Loop``; all processes go on from where the first one stands."""
        with _together():
            if self._rank == 0:
                _send(_on_cpu(self.state_dict()))
            else:
                self.load_state_dict(_receive())
        yield from super().steps()
        dist.destroy_process_group()

    def train_batch(self, index: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """See ``TrainingLoop``; raises ``ProcessLost`` where a process has ended."""
        with _together():
            dist.barrier()
            return super().train_batch(index, epoch, batch)

    def _recorded(self, batch: tuple[Tensor, Tensor]):
        """A recording would have to hold what the processes exchange."""
        return self._update

    def _update(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Make one update from images (B, 3, H, W) and labels (B,) of the whole batch."""
        images, labels = (part.tensor_split(self._size)[self._rank] for part in batch)
        with autocast(self.device, self.config.precision):
            logits = self._shared(images)  # (B / processes, classes)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum") / len(batch[1])
        self.optimizer.zero_grad()
        (self._size * loss).backward()  # of the gradients, the mean over processes is taken
        self.optimizer.step()
        sums = torch.stack([loss.detach().double(), (logits.argmax(1) == labels).sum().double()])
        dist.all_reduce(sums, group=self._group)
        return sums[0], sums[1]


def _on_cpu(state: Any) -> Any:
    """Return a state whose tensors are on the CPU: another process has another device."""
    return tree_map_only(Tensor, Tensor.cpu, state)


def synchronised(network: nn.Module, group: dist.ProcessGroup | None) -> nn.Module:
    """Return a network with the same tensors, in train mode, whose BatchNorms see the batch of all processes.

    Args:
        network: its BatchNorms are PyTorch's own.
        group: of the processes, None for all.
    """
    tensors = *network.parameters(), *network.buffers()
    shared = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors}).train()
    if tensors[0].device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(shared, group)
    for module in shared.modules():
        if type(module) in _PLAIN:
            module.__class__ = GlobalBatchNorm
    return shared


class GlobalBatchNorm(_BatchNorm):
    """What ``nn.SyncBatchNorm`` is on CUDA, for the CPU: BatchNorm over the batch of all processes.

    Shape:
        float (B, C, ...) -> the same; B may be 0 in some processes.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training or self.running_mean is None):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        places, ones = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        values = x.float()
        count = values.new_tensor([values.numel() // values.shape[1]])
        *sums, count = _Sum.apply(torch.cat([values.sum(places), count])).split([values.shape[1], 1])
        mean = sums[0] / count  # (C,)
        centred = values - mean.view(ones)
        variance = _Sum.apply(centred.square().sum(places)) / count  # (C,)
        if self.training and self.running_mean is not None:
            self._remember(mean, variance * count / (count - 1))
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        normalised = centred * scale.view(ones)
        return (normalised if self.bias is None else normalised + self.bias.view(ones)).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of the batch, (C,) each."""
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class _Sum(torch.autograd.Function):
    """The sum over all processes; a gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)
