"""A smaller network that computes the same: what pruned neurons contribute moves into the next layer.

A pruned neuron (``models.neurons``) is a constant, its BatchNorm's shift or its layer's bias, at every place of every
image. Behind the element-wise functions that follow it is still one, c. A chain is a layer that makes channels, what
treats each of them apart from the others, and the layers that take them in. At the end of a chain

- channels with c = 0 contribute nothing and go,
- all others, c_1, ..., c_n, become the one of the largest c_m, whose weights are now sum_k (c_k / c_m) W_k.

The second is exact for any padding: at the border as inside, the layer is linear in its input, and the padded input
planes of constant channels are multiples of each other. (A bias instead would be wrong at the border, where zeros are
padded.) No layer, and no bias, is added, so that a network is its architecture and the shapes of its weights.
Channels that are added to others, as in residual streams, stay.
"""

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from models.tracing import traced
from utils.errors import shorten
from utils.seeding import seeded_generator

CHECKED_IMAGES = 4
TOLERANCE = 1000  # roundings (eps of the data type), of the largest output
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_ELEMENTWISE = {nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish, nn.Hardtanh, nn.Tanh}
_ELEMENTWISE |= {nn.Sigmoid, torch.relu, torch.relu_, torch.tanh, torch.sigmoid, "relu", "relu_", "tanh", "sigmoid"}
_ELEMENTWISE |= {F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.silu, F.gelu, F.mish, F.hardswish, F.hardtanh}
_KEPT = {nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d}  # in eval mode
_POOLS = {nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d}
_POOLS |= {nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d}
_POOLS |= {F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}
_POOLS |= {F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d}
_AVERAGES = {nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d}


class Compaction(NamedTuple):
    """What ``compact`` made: the network, how many channels went, and why none could where there was no way."""

    network: nn.Module
    dropped: int
    obstacle: str | None


@dataclass(frozen=True)
class Chain:
    """Channels from where they are made to where they are taken in.

    Attributes:
        first: path of the convolution or linear layer that makes them.
        width: how many there are.
        steps: what treats each of them apart from the others, in order.
        last: paths of the convolutions and linear layers that take them in.
    """

    first: str
    width: int
    steps: tuple[Node, ...]
    last: tuple[str, ...]


def compact(network: nn.Module, size: tuple[int, ...]) -> Compaction:
    """Return a copy, in eval mode, without the pruned neurons that nothing is added to.

    It is compared with the network on random inputs; where their outputs differ by more than ``TOLERANCE`` roundings,
    the copy is returned unchanged, and so it is where the network cannot be traced.

    Args:
        network: any network; it is not changed. Only float32 and float64 are compacted.
        size: of one input, without the batch: (3, 32, 32).
    """
    original = copy.deepcopy(network).eval()
    weights = next(network.parameters(), torch.empty(0))
    graph = traced(original) if weights.dtype in (torch.float32, torch.float64) else None
    if graph is None:
        return Compaction(original, 0, "its layers cannot be told apart (its own code, hooks, or weights used twice)")
    smaller = copy.deepcopy(original)
    with torch.no_grad():
        dropped = sum(_compact_chain(smaller, chain, _constants(graph, chain)) for chain in find_chains(graph))
    inputs = torch.randn(CHECKED_IMAGES, *size, generator=seeded_generator(0, "compact"), dtype=torch.float64)
    difference = _difference(original, smaller, inputs.to(weights))
    if difference:
        return Compaction(original, 0, f"the smaller network {difference}")
    return Compaction(smaller, dropped, None)


@torch.no_grad()
def shrink(network: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give a network, in place, as many channels as a compacted one has; what its weights are then means nothing.

    Args:
        network: as it was built, in eval mode.
        shapes: of the compacted network's weights, by their names in the state_dict. Shapes that cannot come from
            ``compact`` change nothing, so that they are found when the weights are loaded.
    """
    graph = traced(network)
    for chain in find_chains(graph) if graph is not None else ():
        width = shapes.get(f"{chain.first}.weight", (chain.width,))[:1]
        if width and 0 < width[0] < chain.width:
            _keep(network, chain, torch.arange(width[0]))


def find_chains(graph: GraphModule) -> list[Chain]:
    """Return the chains of a traced network in eval mode, in the order of its layers."""
    chains = [_follow(graph, node) for node in graph.graph.nodes if _is_mixing(_layer(graph, node))]
    return [chain for chain in chains if chain]


def _follow(graph: GraphModule, node: Node) -> Chain | None:
    """Return the chain that begins with a layer; None where something on the way is not understood."""
    first, width = node.target, len(_layer(graph, node).weight)
    flat = isinstance(_layer(graph, node), nn.Linear)
    steps = []
    while True:
        users = [user for user in node.users if not _reads_size(user, node)]
        if users and all(_takes_in(_layer(graph, user), width, flat) for user in users):
            return Chain(first, width, tuple(steps), tuple(user.target for user in users))
        if len(users) != 1 or users[0].args[:1] != (node,):
            return None
        previous, node = node, users[0]
        layer, what = _layer(graph, node), _kind(graph, node)
        if _is_channelwise(layer, width, flat) or (what in _ELEMENTWISE and node.all_input_nodes == [previous]):
            steps.append(node)
        elif not flat and _is_flatten(node, previous, layer):
            flat = True
        elif not (_passes(node, what) or (not flat and what in _POOLS and _keeps_constants(node, layer))):
            return None


def _layer(graph: GraphModule, node: Node) -> nn.Module | None:
    """Return the module that a node calls on one tensor alone."""
    alone = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
    return graph.get_submodule(node.target) if alone else None


def _kind(graph: GraphModule, node: Node) -> Any:
    """Return the type of a module, a function, or the name of a method."""
    return type(graph.get_submodule(node.target)) if node.op == "call_module" else node.target


def _passes(node: Node, what: Any) -> bool:
    """Say whether a node changes nothing in eval mode."""
    return what in _KEPT or (what is F.dropout and node.kwargs.get("training") is False)


def _is_mixing(layer: nn.Module | None) -> bool:
    """Say whether each output channel is computed from all input channels."""
    return type(layer) is nn.Linear or (type(layer) in _CONVOLUTIONS and layer.groups == 1)


def _takes_in(layer: nn.Module | None, width: int, flat: bool) -> bool:
    """Say whether a layer takes in so many channels; behind a flattening, each is a run of features."""
    if type(layer) is nn.Linear:
        return flat and layer.in_features % width == 0
    return _is_mixing(layer) and not flat and layer.in_channels == width


def _is_channelwise(layer: nn.Module | None, width: int, flat: bool) -> bool:
    """Say whether a layer is a BatchNorm with statistics or a depthwise convolution."""
    if type(layer) in _NORMS:
        return layer.num_features == width and layer.affine and layer.running_mean is not None
    return (
        type(layer) in _CONVOLUTIONS and not flat and layer.groups == layer.in_channels == layer.out_channels == width
    )


def _keeps_constants(node: Node, layer: nn.Module | None) -> bool:
    """Say whether a pool of a constant is that constant; padded zeros are averaged along, but never a maximum."""
    settings = node.kwargs if layer is None else vars(layer)
    averages = (node.target if layer is None else type(layer)) in _AVERAGES
    padded = settings.get("padding", 0) not in (0, (0,), (0, 0), (0, 0, 0)) or len(node.args) > 3
    return not settings.get("return_indices") and not (averages and (padded or settings.get("divisor_override")))


def _is_flatten(node: Node, x: Node, layer: nn.Module | None) -> bool:
    """Say whether all but the batch of x becomes one dimension, channel after channel."""
    if layer is not None:
        return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)
    if node.op == "call_module":
        return False
    if node.target in ("flatten", torch.flatten):
        given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
        return given in ({"start_dim": 1}, {"start_dim": 1, "end_dim": -1})
    if node.target in ("view", "reshape") and len(node.args) == 3 and isinstance(node.args[1], Node):
        return node.args[2] == -1 and _size_index(node.args[1], x) == 0
    return False


def _is_shape(node: Node, x: Node) -> bool:
    calls_size = node.op == "call_method" and node.target == "size"
    return (node.target is getattr or calls_size) and node.args == ((x,) if calls_size else (x, "shape"))


def _size_index(node: Node, x: Node) -> Any:
    """Return which entry of the size of x a node is; None where it is none."""
    if node.op == "call_method" and node.target == "size" and len(node.args) == 2 and node.args[0] is x:
        return node.args[1]
    shape = node.args[0] if node.target is operator.getitem else None
    return node.args[1] if isinstance(shape, Node) and _is_shape(shape, x) else None


def _reads_size(node: Node, x: Node) -> bool:
    """Say whether a node only reads sizes of x other than the number of channels."""
    entries = node.users if _is_shape(node, x) else [node]
    indices = [_size_index(entry, x) for entry in entries]
    return all(_is_past_channels(index) for index in indices)


def _is_past_channels(index: Any) -> bool:
    first = index.start if isinstance(index, slice) and index.step is None else index
    return index == 0 or (isinstance(first, int) and first >= 2)


@torch.no_grad()
def _constants(graph: GraphModule, chain: Chain) -> Tensor:
    """Return the value of every channel at the end of a chain, NaN where it is no constant.

    A channel is constant from where all its weights are 0, or its BatchNorm's scale is; other steps keep NaN.
    """
    first = graph.get_submodule(chain.first)
    bias = first.weight.new_zeros(chain.width) if first.bias is None else first.bias
    values = bias.masked_fill(first.weight.flatten(1).any(1), torch.nan)
    for step in chain.steps:
        layer = _layer(graph, step)
        if type(layer) in _NORMS:
            scale = layer.weight / (layer.running_var + layer.eps).sqrt()
            values = torch.where(layer.weight == 0, layer.bias, (values - layer.running_mean) * scale + layer.bias)
        elif type(layer) in _CONVOLUTIONS:
            padded = layer.padding != "valid" and any(layer.padding)
            sums = values * layer.weight.flatten(1).sum(1)
            values = values.masked_fill(values != 0, torch.nan) if padded else sums
            values = values if layer.bias is None else values + layer.bias
        elif layer is not None:
            values = layer(values)
        elif step.op == "call_method":
            values = getattr(values, step.target)(*step.args[1:], **step.kwargs)
        else:
            values = step.target(values, *step.args[1:], **step.kwargs)
    return values


def _compact_chain(network: nn.Module, chain: Chain, values: Tensor) -> int:
    """Merge the constant channels of a chain and return how many went."""
    constant = values.isfinite()
    keep = ~constant
    if (constant & (values != 0)).any():
        kept = values.nan_to_num(0, 0, 0).abs().argmax()
        shares = torch.where(constant, values / values[kept], 0).double()
        for path in chain.last:
            layer = network.get_submodule(path)
            weight = _by_channel(layer, chain.width).clone()  # (out, C, ...); another layer may share it
            weight[:, kept] = torch.einsum("oc...,c->o...", weight.double(), shares).to(weight)
            _replace(layer, "weight", weight.flatten(1, 2))
        keep[kept] = True
    if not keep.any():
        keep[0] = True
    _keep(network, chain, keep.nonzero().flatten())
    return int((~keep).sum())


def _by_channel(layer: nn.Module, width: int) -> Tensor:
    """Return a layer's weights with the channels that it takes in, and what it takes of each, as dimensions 1 and 2."""
    return layer.weight.detach().unflatten(1, (width, -1))


def _keep(network: nn.Module, chain: Chain, kept: Tensor) -> None:
    """Keep these channels of a chain alone, in place."""
    count = len(kept)
    for path in (chain.first, *(step.target for step in chain.steps if step.op == "call_module")):
        layer = network.get_submodule(path)
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(layer, name, None) is not None:
                _replace(layer, name, getattr(layer, name).detach()[kept.to(layer.weight.device)])
        _declare(layer, count, ("out_channels", "out_features", "num_features"))
        if path != chain.first:  # a depthwise convolution
            _declare(layer, count, ("in_channels", "groups"))
    for path in chain.last:
        layer = network.get_submodule(path)
        weight = _by_channel(layer, chain.width)[:, kept.to(layer.weight.device)]
        _replace(layer, "weight", weight.flatten(1, 2))
        _declare(layer, layer.weight.shape[1], ("in_channels", "in_features"))


def _replace(layer: nn.Module, name: str, values: Tensor) -> None:
    """Replace a weight or a buffer, which others may share, by another."""
    old = getattr(layer, name)
    setattr(layer, name, nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values)


def _declare(layer: nn.Module, count: int, names: tuple[str, ...]) -> None:
    for name in names:
        if hasattr(layer, name):
            setattr(layer, name, count)


@torch.inference_mode()
def _difference(network: nn.Module, other: nn.Module, inputs: Tensor) -> str | None:
    """Say how outputs differ; None where they are the same to rounding."""
    try:
        pairs = zip(tree_leaves(network(inputs.clone())), tree_leaves(other(inputs.clone())), strict=True)
        for expected, found in pairs:
            limit = TOLERANCE * torch.finfo(expected.dtype).eps * expected.abs().max()
            worst = (found - expected).abs().max()
            if not worst <= limit:
                return f"computes something else (by up to {worst:.1e})"
    except Exception as error:  # the network's own code, which may fail in any way
        reason = shorten(str(error).partition("\n")[0])
        return f"cannot be compared ({type(error).__name__}: {reason})"
    return None
