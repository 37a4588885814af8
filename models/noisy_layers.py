"""Layers with a mask and a perturbation for each of their neurons.

Wu & Wang, NeurIPS 2021, section 4.2 and equation 5: a neuron's weight w is BatchNorm's scale gamma and its bias b the
shift beta, since both absorb the convolution before them. In a network without BatchNorms they are weight and bias of
the layers that ``models.neuron_layers`` names.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.neuron_layers import NO_NEURON, OTHER_NORMS, along_first, neuron_layers
from utils.errors import InputError
from utils.seeding import seeded_generator

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NAMES = {"mask", "weight_noise", "bias_noise", "perturbed", "effective_weight", "effective_bias", "_of_one_run"}
_PLAIN_OTHER = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


class NoisyLayer(nn.Module):
    """What every converted layer has: neurons whose weight is masked, and whose weight and bias can be perturbed.

    Effective weight ``w * (mask + weight_noise)`` and bias ``b * (1 + bias_noise)`` while ``perturbed`` is set,
    ``w * mask`` and ``b`` while it is not, for each of the C entries of w and b along their first dimension. A layer
    without a bias has no use for its noise.

    Attributes:
        mask, weight_noise, bias_noise: float32 (C,); the mask in [0, 1]. Buffers that may be replaced by tensors with
            a gradient, and that are no part of the state_dict: its names stay those of the network that came in. A
            ``NoisyBatchNorm`` takes those of R runs as well, (R, C).
        perturbed: whether the noise is applied.
    """

    def __init__(self, layer: nn.Module):
        """Take over all of a layer: tensors are shared with it, not copied, and hooks stay hooks."""
        nn.Module.__init__(self)
        for name, value in vars(layer).items():
            vars(self)[name] = value.copy() if isinstance(value, (dict, set)) else value
        weight = layer._parameters["weight"]
        ones = torch.ones(len(weight), dtype=torch.float32, device=weight.device)
        self.register_buffer("mask", ones, persistent=False)
        self.register_buffer("weight_noise", torch.zeros_like(ones), persistent=False)
        self.register_buffer("bias_noise", torch.zeros_like(ones), persistent=False)
        self.perturbed = False

    def effective_weight(self) -> Tensor:
        """Return the weight that the layer applies now, float (C, ...), or (R, C, ...) for R runs."""
        weight = self._parameters["weight"]
        scale = self.mask + self.weight_noise if self.perturbed else self.mask
        return (weight * along_first(scale, weight)).to(weight.dtype)  # noise is float32, a network may be half

    def effective_bias(self) -> Tensor | None:
        """Return the bias that the layer applies now, float (C, ...) or (R, C, ...), None where it has none."""
        bias = self._parameters.get("bias")
        if bias is None or not self.perturbed:
            return bias
        return (bias * along_first(1 + self.bias_noise, bias)).to(bias.dtype)


class NoisyBatchNorm(NoisyLayer, _BatchNorm):
    """BatchNorm (1d, 2d or 3d) whose scale is masked and whose scale and shift can be perturbed.

    In train mode it normalises with the statistics of the batch; the running statistics are never changed, so that
    evaluation uses those the network came with.

    With masks (R, C) a batch holds the images of R runs, one run after the other: each run has its own masks, noise
    and statistics, as if it were alone.

    Shape:
        float (B, C, ...), or (R * B, C, ...) -> the same.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {x.dim()}")

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.effective_weight(), self.effective_bias()
        if self.mask.dim() == 1:
            return self._of_one_run(x, weight, bias)
        runs = len(self.mask)
        biases = [None] * runs if bias is None else bias.expand_as(weight)  # (R, C)
        parts = zip(x.split(len(x) // runs), weight, biases, strict=True)
        return torch.cat([self._of_one_run(*part) for part in parts])

    def _of_one_run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self._check_input_dim(x)
        if self.training or self.running_mean is None:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)


class _OwnForward(NoisyBatchNorm):
    """The base, before the subclass itself, of what a subclass of BatchNorm with a forward of its own becomes.

    That forward runs unchanged. While it runs, ``weight`` and ``bias`` are the effective scale and shift, and the
    buffers are copies, so that whatever it does to running statistics is forgotten.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        super(NoisyBatchNorm, self)._check_input_dim(x)

    def _of_one_run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        before = {name: vars(self)[name] for name in ("_parameters", "_buffers", "track_running_stats")}
        vars(self).update(
            _parameters={**self._parameters, "weight": weight, "bias": bias},
            _buffers={name: buffer if buffer is None else buffer.clone() for name, buffer in self._buffers.items()},
            track_running_stats=self.track_running_stats and not self.training,
        )
        try:
            return super(NoisyBatchNorm, self).forward(x)
        finally:
            vars(self).update(before)


class _Masked(NoisyLayer):
    """The base, before its own class, of what a layer other than a BatchNorm becomes.

    Whoever reads ``weight`` and ``bias`` finds the effective ones: the layer's own forward, and code that uses them
    without calling the layer, as ``nn.MultiheadAttention`` does.
    """

    @property
    def weight(self) -> Tensor:
        return self.effective_weight()

    @property
    def bias(self) -> Tensor | None:
        return self.effective_bias()


def _is_convertible(name: str, layer: nn.Module) -> bool:
    if isinstance(layer, NoisyLayer):
        return False
    kind, cannot = type(layer).__name__, f"{name}: {type(layer).__name__} cannot be converted"
    if isinstance(layer._parameters.get("weight"), nn.parameter.UninitializedParameter):
        raise InputError(f"{name}: {kind} has no size yet; run the network once, then convert it")
    if "forward" in vars(layer):
        raise InputError(f"{name}: the forward of this {kind} was replaced: it cannot be converted")
    if "weight" not in layer._parameters:
        raise InputError(f"{cannot}: it computes its weight, so that a mask cannot reach it")
    if taken := _NAMES & set(dir(layer)):
        raise InputError(f"{cannot}: it has something of its own named {', '.join(sorted(taken))}")
    if isinstance(layer, (_BatchNorm, *OTHER_NORMS)) and type(layer) not in (*_PLAIN, *_PLAIN_OTHER):
        _check_own_forward(cannot, layer)
    return True


def _noisy(layer: nn.Module) -> NoisyLayer:
    kind = type(layer)
    if kind in _PLAIN:
        return NoisyBatchNorm(layer)
    base = _OwnForward if isinstance(layer, _BatchNorm) else _Masked
    return type(f"Noisy{kind.__name__}", (base, kind), {})(layer)


@torch.no_grad()
def _check_own_forward(cannot: str, norm: nn.Module) -> None:
    """Make sure that a subclass scales by ``weight``: all masks at 0, its output does not depend on its input.

    Raises:
        InputError: it does depend, or the forward cannot be tried.
    """
    weight = norm._parameters["weight"]
    if weight.is_meta:
        return  # there is no content to compare
    probe = _noisy(copy.deepcopy(norm)).eval()
    probe.mask.zero_()
    generator = seeded_generator(0, "own forward")
    sizes = ((2, 2), (), (2,), (2, 2, 2))
    shapes = [(*weight.shape, *size) for size in sizes] + [(*size, *weight.shape) for size in sizes]
    for shape in shapes:  # which of them the forward takes is its own affair
        inputs = torch.randn(2, 4, *shape, generator=generator).to(weight)
        try:
            one, other = map(probe.forward, inputs)
        except Exception as error:
            reason = error
            continue
        if not torch.allclose(one, other, rtol=0, atol=0, equal_nan=True):
            raise InputError(f"{cannot}: its forward does not scale by its weight, so that a mask cannot reach it")
        return
    raise InputError(f"{cannot}: its forward takes no tensor of 2 to 5 dimensions alone ({reason})") from reason


def convert_noisy(module: nn.Module, inplace: bool = False) -> nn.Module:
    """Replace every layer that has neurons, as ``models.neuron_layers`` names them, by a ``NoisyLayer``.

    BatchNorms become ``NoisyBatchNorm``. Other layers and subclasses of BatchNorm keep their own forward, which sees
    the masked and perturbed weight and bias as ``weight`` and ``bias``; what they become is an instance of their own
    class, too.

    Works like ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``: the network's own classes know nothing of it. A
    module used in several places stays one module. BatchNorms without scale and shift have nothing to mask and stay
    as they are.

    Args:
        module: any network.
        inplace: change ``module`` itself instead of a deep copy.

    Returns:
        The converted network (a new object where ``module`` itself is a layer).

    Raises:
        InputError: the network has no neuron, or as ``neuron_layers``; a lazy layer has no size yet, the forward of a
            layer was replaced, or that of a subclass does not scale by its ``weight``.
    """
    names = [name for name, layer in neuron_layers(module).items() if _is_convertible(name, layer)]
    module = module if inplace else copy.deepcopy(module)
    found = {layer: _noisy(layer) for layer in map(module.get_submodule, names)}
    for parent in [*module.modules(), *found.values()]:  # a BatchNorm may hold BatchNorms
        for name, child in parent._modules.items():
            if child in found:
                setattr(parent, name, found[child])
    module = found.get(module, module)
    if not noisy_layers(module):
        raise InputError(NO_NEURON)
    return module


def noisy_layers(module: nn.Module) -> dict[str, NoisyLayer]:
    """Return the converted layers by module path, in state_dict order, shared ones once."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, NoisyLayer)}
