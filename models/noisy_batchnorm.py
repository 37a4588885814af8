"""BatchNorm with a mask and a perturbation for each channel: the "neuron" of ANP.

Wu & Wang, NeurIPS 2021, section 4.2 and equation 5: a neuron's weight w is BatchNorm's scale gamma and its bias b the
shift beta, since both absorb the convolution before them.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        scale = self.mask + self.weight_noise if self.perturbed else self.mask
        weight = self.weight * scale
        bias = self.bias * (1 + self.bias_noise) if self.perturbed else self.bias
        if self.training or self.running_mean is None:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)


def _is_convertible(name: str, module: nn.Module) -> bool:
    if not isinstance(module, _BatchNorm) or isinstance(module, NoisyBatchNorm):
        return False
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{name}: {type(module).__name__} has no size yet; run the network once, then convert it")
    if type(module) not in _PLAIN or "forward" in vars(module):
        raise TypeError(f"{name}: {type(module).__name__} has a forward of its own and cannot be converted")
    return module.affine


def convert_noisy_batchnorm(module: nn.Module, inplace: bool = False) -> nn.Module:
    """Replace every affine BatchNorm of any network by a ``NoisyBatchNorm``.

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
        TypeError: a subclass of BatchNorm would lose its own forward.
    """
    names = [name for name, layer in module.named_modules() if _is_convertible(name, layer)]
    module = module if inplace else copy.deepcopy(module)
    found = {layer: NoisyBatchNorm(layer) for layer in map(module.get_submodule, names)}
    for parent in list(module.modules()):
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
