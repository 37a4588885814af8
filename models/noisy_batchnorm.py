"""BatchNorm with a mask and a perturbation for each channel: the "neuron" of ANP.

Wu & Wang, NeurIPS 2021, section 4.2 and equation 5: a neuron's weight w is BatchNorm's scale gamma and its bias b the
shift beta, since both absorb the convolution before them.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.seeding import seeded_generator

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class NoisyBatchNorm(_BatchNorm):
    """BatchNorm (1d, 2d or 3d) whose scale is masked and whose scale and shift can be perturbed.

    Effective scale ``gamma * (mask + weight_noise)`` and shift ``beta * (1 + bias_noise)`` while ``perturbed`` is
    set, ``gamma * mask`` and ``beta`` while it is not. In train mode it normalises with the statistics of the batch;
    the running statistics are never changed, so that evaluation uses those the network came with.

    Attributes:
        mask, weight_noise, bias_noise: float32 (C,); the mask in [0, 1]. Buffers that may be replaced by tensors with
            a gradient, and that are no part of the state_dict: its names stay those of the network that came in.
        perturbed: whether the noise is applied.

    Shape:
        float (B, C, ...) -> the same.
    """

    def __init__(self, norm: _BatchNorm):
        """Take over all of an affine BatchNorm: tensors are shared with it, not copied, and hooks stay hooks."""
        nn.Module.__init__(self)
        for name, value in vars(norm).items():
            vars(self)[name] = value.copy() if isinstance(value, (dict, set)) else value
        ones = torch.ones_like(norm.weight, dtype=torch.float32, requires_grad=False)
        self.register_buffer("mask", ones, persistent=False)
        self.register_buffer("weight_noise", torch.zeros_like(ones), persistent=False)
        self.register_buffer("bias_noise", torch.zeros_like(ones), persistent=False)
        self.perturbed = False

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected an input of at least 2 dimensions, got {x.dim()}")

    def effective(self) -> tuple[Tensor, Tensor]:
        """Return the scale and the shift that the layer applies now, float (C,) each."""
        scale = self.mask + self.weight_noise if self.perturbed else self.mask
        weight = self.weight * scale
        bias = self.bias * (1 + self.bias_noise) if self.perturbed else self.bias
        return weight.to(self.weight.dtype), bias.to(self.weight.dtype)  # noise is float32, a network may be half

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        weight, bias = self.effective()
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

    def forward(self, x: Tensor) -> Tensor:
        before = {name: vars(self)[name] for name in ("_parameters", "_buffers", "track_running_stats")}
        weight, bias = self.effective()
        vars(self).update(
            _parameters={**self._parameters, "weight": weight, "bias": bias},
            _buffers={name: buffer if buffer is None else buffer.clone() for name, buffer in self._buffers.items()},
            track_running_stats=self.track_running_stats and not self.training,
        )
        try:
            return super(NoisyBatchNorm, self).forward(x)
        finally:
            vars(self).update(before)


def _is_convertible(name: str, module: nn.Module) -> bool:
    if not isinstance(module, _BatchNorm) or isinstance(module, NoisyBatchNorm):
        return False
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{name}: {type(module).__name__} has no size yet; run the network once, then convert it")
    if "forward" in vars(module):
        raise TypeError(f"{name}: the forward of this {type(module).__name__} was replaced: it cannot be converted")
    if module.affine and type(module) not in _PLAIN:
        _check_own_forward(name, module)
    return module.affine


def _noisy(norm: _BatchNorm) -> NoisyBatchNorm:
    kind = type(norm)
    if kind in _PLAIN:
        return NoisyBatchNorm(norm)
    return type(f"Noisy{kind.__name__}", (_OwnForward, kind), {})(norm)


@torch.no_grad()
def _check_own_forward(name: str, norm: _BatchNorm) -> None:
    """Make sure that a subclass scales by ``weight``: all masks at 0, its output does not depend on its input.

    Raises:
        TypeError: it does depend, or the forward cannot be tried.
    """
    cannot = f"{name}: {type(norm).__name__} cannot be converted"
    if taken := {"mask", "weight_noise", "bias_noise", "perturbed", "effective"} & set(dir(norm)):
        raise TypeError(f"{cannot}: it has something of its own named {', '.join(sorted(taken))}")
    probe = _noisy(copy.deepcopy(norm)).eval()
    probe.mask.zero_()
    generator = seeded_generator(0, "own forward")
    for size in ((2, 2), (), (2,), (2, 2, 2)):  # which of them the forward takes is its own affair
        inputs = torch.randn(2, 4, norm.num_features, *size, generator=generator).to(norm.weight)
        try:
            one, other = map(probe.forward, inputs)
        except Exception as error:
            reason = error
            continue
        if not torch.allclose(one, other, rtol=0, atol=0, equal_nan=True):
            raise TypeError(f"{cannot}: its forward does not scale by its weight, so that a mask cannot reach it")
        return
    raise TypeError(f"{cannot}: its forward takes no tensor of 2 to 5 dimensions alone ({reason})") from reason


def convert_noisy_batchnorm(module: nn.Module, inplace: bool = False) -> nn.Module:
    """Replace every affine BatchNorm of any network by a ``NoisyBatchNorm``.

    A subclass of BatchNorm keeps its own forward, which sees the masked and perturbed scale and shift as ``weight``
    and ``bias``; it becomes a ``NoisyBatchNorm`` that is an instance of the subclass, too.

    Works like ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``: the network's own classes know nothing of it. A
    module used in several places stays one module. BatchNorms without scale and shift have nothing to mask and stay
    as they are.

    Args:
        module: any network.
        inplace: change ``module`` itself instead of a deep copy.

    Returns:
        The converted network (a new object where ``module`` itself is a BatchNorm).

    Raises:
        ValueError: no affine BatchNorm is left to mask, or a lazy one has no size yet.
        TypeError: the forward of a BatchNorm was replaced, or that of a subclass does not scale by its ``weight``.
    """
    names = [name for name, layer in module.named_modules() if _is_convertible(name, layer)]
    module = module if inplace else copy.deepcopy(module)
    found = {layer: _noisy(layer) for layer in map(module.get_submodule, names)}
    for parent in [*module.modules(), *found.values()]:  # a BatchNorm may hold BatchNorms
        for name, child in parent._modules.items():
            if child in found:
                setattr(parent, name, found[child])
    module = found.get(module, module)
    if not noisy_layers(module):
        raise ValueError("the network has no BatchNorm with scale and shift: ANP has no neuron to mask")
    return module


def noisy_layers(module: nn.Module) -> dict[str, NoisyBatchNorm]:
    """Return the converted BatchNorms by module path, in state_dict order, shared ones once."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, NoisyBatchNorm)}
