"""What a run is going to need, against networks that are really built, and what is said where it is too much."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from engine import memory
from engine.memory import (
    masking_bytes,
    on_meta,
    parameter_bytes,
    peak_bytes,
    pruning_bytes,
    training_bytes,
)
from models import build_model
from utils import machine
from utils.errors import InputError
from utils.machine import as_one_line, check_memory

CPU, FP32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16
ESTIMATES = [training_bytes, masking_bytes, pruning_bytes]


def narrow(arch="resnet18", width=0.125):
    return partial(build_model, arch, 10, width)


@pytest.fixture
def bare(monkeypatch):
    """Estimates without what is added for the libraries."""
    monkeypatch.setattr(memory, "FACTOR", 1)
    monkeypatch.setattr(memory, "OVERHEAD", 0)


def test_bytes_of_parameters():
    network = on_meta(narrow())
    assert all(tensor.is_meta for tensor in network.state_dict().values())
    assert parameter_bytes(network) == sum(tensor.nbytes for tensor in narrow()().state_dict().values())


def test_peak_counts_what_is_alive_at_once():
    def work():
        first = torch.empty(1000, device="meta")  # 4,000 bytes
        second = first + 1  # 8,000
        view = second.view(10, 100)
        del first  # 4,000
        third = torch.cat([view, view])  # 12,000
        del second, view, third
        torch.empty(2500, device="meta")  # 10,000

    assert peak_bytes(work) == 12_000


def test_a_training_step_holds_what_autograd_keeps(bare):
    network, kept = narrow()().train(), {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(network(torch.randn(64, 3, 32, 32)), torch.arange(64) % 10)
    step = memory._step_bytes(on_meta(narrow()), 64, (32, 32), False)
    assert loss.isfinite() and sum(kept.values()) < step < 1.3 * sum(kept.values())


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_estimates_follow_batch_precision_and_image_size(bare, estimate):
    network = on_meta(narrow(width=0.0625))
    small = estimate(network, 4000, FP32)
    assert estimate(network, 8000, FP32) == pytest.approx(2 * small, rel=0.1)
    assert estimate(network, 4000, BF16) == pytest.approx(small / 2, rel=0.1)
    assert estimate(network, 1000, FP32, (64, 64)) == pytest.approx(small, rel=0.1)


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_a_network_that_fits_nowhere_is_counted_without_being_built(estimate):
    network = on_meta(narrow("resnet18", 64))
    assert estimate(network, 2, FP32) > 3 * parameter_bytes(network) > 500e9


def test_masks_need_no_gradients_of_weights():
    network = on_meta(narrow(width=4))
    step, masks = (memory._step_bytes(network, 2, (32, 32), masks) for masks in (False, True))
    assert masks < step - parameter_bytes(network) / 2


@pytest.mark.parametrize(("free", "refused"), [(999, True), (1000, False), (None, False)])
def test_check(monkeypatch, free, refused):
    monkeypatch.setattr(machine, "free_memory", lambda: free and free * 10**7)
    check = partial(check_memory, 10**10, "width 64", "lower --widen-factor", CPU)
    if not refused:
        return check()
    with pytest.raises(InputError, match=r"^width 64 needs about 10.0 GB, 10.0 GB are free; lower --widen-factor$"):
        check()
    return None


def test_check_on_cuda_asks_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device.index * 10**9, 80 * 10**9))
    check_memory(10**9, "it", "wait", torch.device("cuda:2"))
    with pytest.raises(InputError, match=r"3.5 GB, 2.0 GB are free"):
        check_memory(35 * 10**8, "it", "wait", torch.device("cuda:2"))


def test_memory_that_ran_out_is_one_line():
    with pytest.raises(RuntimeError) as real:
        torch.empty(10**15)
    line = as_one_line(real.value)
    assert line.startswith("out of memory (tried to allocate 4000000000000000 bytes); smaller batches")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory; smaller batches or a narrower network need less"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
            "allocate 20.00 gib); smaller",
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), "8 bytes); smaller"),
    ],
)
def test_errors_that_mean_memory(error, words):
    assert words in as_one_line(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("DefaultCPUAllocator"), KeyError("a")])
def test_other_errors_stay_what_they_are(error):
    assert as_one_line(error) is None
