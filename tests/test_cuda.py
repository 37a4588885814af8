"""What would crash on a GPU, found without one: fake CUDA tensors notice every tensor left on the CPU."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode

import data.augment
import engine.parallel as parallel
from attacks import ATTACKS, CleanLabel
from attacks.input_aware import InputAwareTrainConfig
from benchmarks.plain import PlainMasks, plain_train
from data.datasets import SYNTHETIC_NORMALIZATION, Dataset, ImageSet
from data.synthetic import CLASSES
from defenses.anp import AnpConfig, AnpState, MaskLoop, _iterate, apply_masks, draw_batches, show_masks
from engine.evaluation import Evaluator
from engine.runtime import RuntimeConfig, prepare_runtime
from engine.training import TrainConfig
from formats.subject import Subject
from models import build_model, convert_noisy
from utils.errors import InputError

CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16
SEEDED = ("engine.training", "defenses.anp", "attacks.attack", "attacks.blend")


def move(module, function, recurse=True):
    """``Module._apply`` for fake tensors, whose storage cannot be swapped."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(function(parameter.data), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = function(buffer)
    return module


def deepcopy(tensor, memo):
    """``Tensor.__deepcopy__`` likewise; the original crashes on fake CUDA tensors."""
    if id(tensor) not in memo:
        copied = tensor.detach().clone()
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
    return memo[id(tensor)]


def backward(loss):
    """``Tensor.backward`` without a GPU's streams: every leaf of the graph gets a gradient, of zeros."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            node.variable.grad = torch.zeros_like(node.variable)
        nodes += [next_node for next_node, _ in node.next_functions]


def gradients(loss, inputs, materialize_grads=False):
    """``torch.autograd.grad`` likewise."""
    assert loss.device == CUDA
    return tuple(torch.zeros_like(part) for part in (inputs if isinstance(inputs, (tuple, list)) else [inputs]))


def step(optimizer):
    """An optimizer's step: the fused kernels have no fake form, but take no tensor from the CPU."""
    parts = [part for group in optimizer.param_groups for part in group["params"]]
    assert parts and all(part.device == part.grad.device == CUDA for part in parts)


def not_recorded(iterate, changed, batch):
    """Instead of recording, which needs a GPU: all that an update reads or changes is there."""
    assert changed and all(part.device == CUDA for part in (*changed, *batch))
    return iterate


@pytest.fixture
def fake(monkeypatch):
    """Tensors on cuda:0 where there is no GPU; everything is as on a GPU but the values and the gradients."""
    for module in SEEDED:  # a CUDA generator needs a GPU
        monkeypatch.setattr(f"{module}.seeded_generator", lambda *names, device="cpu": torch.Generator())
    monkeypatch.setattr(data.augment, "_constants", data.augment._constants.__wrapped__)  # nothing fake may stay
    monkeypatch.setattr(nn.Module, "_apply", move)
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", deepcopy)
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", deepcopy)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    monkeypatch.setattr(torch.autograd, "grad", gradients)
    monkeypatch.setattr("engine.training.replayed", not_recorded)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 1.0)
    for place in (torch, torch.Tensor):  # as if every entry were set
        monkeypatch.setattr(place, "nonzero", lambda tensor: torch.arange(len(tensor), device=tensor.device)[:, None])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@pytest.fixture
def images(fake):
    pixels = torch.zeros(40, 32, 32, 3, dtype=torch.uint8, device=CUDA)
    return ImageSet(pixels, torch.zeros(40, dtype=torch.int64, device=CUDA), 10)


@pytest.fixture
def network(fake):
    return build_model("resnet18", 10, 1 / 16).to(CUDA, memory_format=torch.channels_last)


def test_fake_tensors_notice_what_was_left_on_the_cpu(network):
    with pytest.raises(RuntimeError, match="device"):
        network(torch.zeros(2, 3, 32, 32))


def first_steps(name, images, network, precision):
    config = (InputAwareTrainConfig if name.startswith("iab") else TrainConfig)(epochs=2, batch_size=20)
    dataset = Dataset("drawn", SYNTHETIC_NORMALIZATION, True, CLASSES, images, images)
    poisoned, config = ATTACKS["benign"]().poison(images), replace(config, precision=precision)
    loop = ATTACKS[name]().make_loop(network, poisoned, dataset, config)
    steps = loop.steps()
    for _ in range(loop.total):
        next(steps)
    return loop


@pytest.mark.parametrize("precision", [torch.float32, BF16])
@pytest.mark.parametrize("name", ["badnets", "iab-one", "iab-all"])
def test_training(name, images, network, precision):
    """Both epochs: the input-aware attacks train their mask generator in the first."""
    loop = first_steps(name, images, network, precision)
    assert loop.done == 4 and loop.means.sums.device == CUDA
    assert all(parameter.grad.device == CUDA for parameter in network.parameters())
    momenta = [state["momentum_buffer"] for state in loop.optimizer.state.values()]
    rates = [group["lr"] for group in loop.optimizer.param_groups]
    assert {part.device for part in (*momenta, *rates)} == {CUDA} and len(momenta) == len(list(network.parameters()))


@pytest.mark.parametrize(("project", "runs"), [(False, 1), (True, 1), (True, 3)])
def test_mask_iteration(images, network, project, runs):
    noisy = convert_noisy(network.requires_grad_(False))
    config = AnpConfig(batch_size=8, project=project, precision=BF16, steps=2)
    configs = [replace(config, seed=seed) for seed in range(runs)]
    state = AnpState.start(noisy, runs)
    loop = MaskLoop(Subject(network, SYNTHETIC_NORMALIZATION, True, images, {}), configs)
    batch = draw_batches(images.images, images.labels, state.mask.shape[1], configs, 0, loop.transform)
    values = _iterate(noisy.eval(), configs, state, batch)
    loop.means.add(*(value.mean() for value in values))
    show_masks(noisy, state.mask[0])
    assert {tensor.device for tensor in (*batch, *values, state.mask, state.momentum, loop.means.sums)} == {CUDA}
    assert next(apply_masks(network, noisy).parameters()).device == CUDA


@pytest.mark.parametrize("name", ["badnets", "badnets-all", "blend", "sig", "benign"])
def test_poisoning_and_evaluation(name, images, network):
    poisoned = ATTACKS[name]().poison(images)
    assert poisoned.train.images.device == poisoned.train.labels.device == CUDA
    evaluator = Evaluator(images, poisoned.trigger, SYNTHETIC_NORMALIZATION, BF16, images)
    assert evaluator(network).clean.accuracy == 1 / 40  # every sum is 1
    if poisoned.trigger:
        assert evaluator.sets["triggered"].images.device == evaluator.sets["triggered"].labels.device == CUDA


def test_clean_label(images, network):
    poisoned = CleanLabel(clb_steps=2).poison(images, 0, network, SYNTHETIC_NORMALIZATION, BF16)
    assert poisoned.train.images.device == CUDA


@pytest.mark.parametrize("name", ["iab-one", "iab-all"])
def test_triggers_drawn_by_generators(name, images, network):
    loop = first_steps(name, images, network, BF16)
    trigger = loop.draw_trigger(images)
    assert trigger.pattern.device == trigger.mask.device == trigger.target.device == torch.device("cpu")
    assert Evaluator(images, trigger, SYNTHETIC_NORMALIZATION, BF16, cross=True)(network).cross


def test_several_processes(images, network, monkeypatch):
    """PyTorch's own BatchNorm over all processes, whose tensors travel over NCCL; nothing waits for the device."""
    asked, summed = [], []
    monkeypatch.setattr(dist, "get_rank", lambda *group: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda *group: 2)
    monkeypatch.setattr(dist, "new_group", lambda **options: asked.append(options) or "nccl group")
    monkeypatch.setattr(dist, "barrier", lambda: asked.append("barrier"))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: summed.append((tensor.device, group)))
    monkeypatch.setattr(dist, "broadcast_object_list", lambda content: None)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", nn.BatchNorm2d.forward)  # which needs the other process
    monkeypatch.setattr(nn.SyncBatchNorm, "_check_input_dim", lambda norm, x: None)
    monkeypatch.setattr(parallel, "DistributedDataParallel", lambda module, **options: module)
    monkeypatch.setattr("engine.training.replayed", None)
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: 0.1)  # the learning rate in the state that is sent
    loop = parallel.ParallelLoop(network, images, SYNTHETIC_NORMALIZATION, True, TrainConfig(epochs=1, batch_size=30))
    norms = [module for module in loop._shared.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert {type(module) for module in norms} == {nn.SyncBatchNorm}
    assert {module.process_group for module in norms} == {"nccl group"} and asked[0]["backend"] == "nccl"
    steps = loop.steps()
    assert [next(steps), next(steps)] == [30, 10] and asked[1:] == ["barrier"] * 2
    assert summed == [(CUDA, "nccl group")] * 2 and all(
        parameter.grad.device == CUDA for parameter in network.parameters()
    )


def test_stamping_sends_no_float64_over_the_bus(images, monkeypatch):
    trigger, sent = ATTACKS["blend"]().poison(images).trigger, []
    original = torch.Tensor.to

    def to(tensor, *args, **options):
        moved = original(tensor, *args, **options)
        if tensor.device != moved.device:
            sent.append(moved.dtype)
        return moved

    monkeypatch.setattr(torch.Tensor, "to", to)
    trigger = replace(trigger, mask=trigger.mask.float())
    assert trigger.stamp(images.images).device == CUDA
    assert sent == [torch.uint8, torch.float32]


def test_plain_loops(images, network):
    """The reference that the benchmarks measure against."""
    inputs = torch.zeros(8, 3, 32, 32, device=CUDA)
    plain_train(network, [(inputs, images.labels[:8])])
    plain = PlainMasks(network, AnpConfig(batch_size=8))
    noise = torch.zeros(2, len(plain.mask()), device=CUDA)
    plain.iterate(inputs, images.labels[:8], noise)
    assert plain.mask().device == CUDA


# ---- the choice of a device


@pytest.fixture
def two_gpus(monkeypatch):
    """``torch.cuda`` as on a machine with two of them; the devices that were set."""
    chosen = []

    def set_device(device):
        if device.index is None:
            raise ValueError(f"Expected a torch.device with a specified index, but got: {device}")  # as PyTorch does
        chosen.append(device)

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_capability": lambda device: (9, 0),
        "set_device": set_device,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    yield chosen
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_every_cuda_device_gets_its_number(two_gpus, name, index):
    runtime = prepare_runtime(RuntimeConfig(name))
    assert runtime.device == torch.device("cuda", index) and two_gpus == [runtime.device]
    assert runtime.precision == BF16 and torch.are_deterministic_algorithms_enabled()


def test_a_device_that_is_not_there(two_gpus):
    with pytest.raises(InputError, match="--device cuda:2: there are 2 CUDA devices"):
        prepare_runtime(RuntimeConfig("cuda:2"))
