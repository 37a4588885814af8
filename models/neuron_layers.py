"""Which layers of a network have neurons, and what of them is one.

Wu & Wang, *Adversarial Neuron Pruning Purifies Backdoored Deep Models*, NeurIPS 2021, section 4.2, for BatchNorm; other
networks have the nearest thing to it: the first kind of layer that they have of BatchNorms, other normalisations, and
convolutions with linear layers.
"""

from collections import Counter

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from utils.errors import InputError

NO_NEURON = (
    "the network has no normalisation with a scale, and no convolution or linear layer before its last: there is no "
    "neuron to mask or perturb"
)
OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _InstanceNorm)


def neuron_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose channels are neurons by module path, in state_dict order, shared ones once.

    A neuron is an entry, along its first dimension, of a layer's ``weight``: a scale, or the weights of an output
    channel. The layers are the first of these that the network has:

    1. its BatchNorms with scale and shift;
    2. its LayerNorms, GroupNorms, InstanceNorms and RMSNorms with a scale;
    3. its convolutions, transposed ones apart, and linear layers, but for the one that makes the logits. That is
       taken to be the last linear layer in state_dict order, or the last convolution where no layer is linear.

    Raises:
        InputError: the mask of a layer of 2. or 3. could not act: its ``weight`` is computed from other parameters or
            belongs to another layer too, or it is a convolution or linear layer with a forward of its own.
    """
    modules = dict(network.named_modules())
    norms = {name: layer for name, layer in modules.items() if isinstance(layer, _BatchNorm) and _scales(layer)}
    if norms:
        return norms
    layers = {name: layer for name, layer in modules.items() if isinstance(layer, OTHER_NORMS) and _scales(layer)}
    layers = layers or _before_the_logits(modules)
    owners = Counter(id(parameter) for module in modules.values() for parameter in module._parameters.values())
    for name, layer in layers.items():
        _check(f"{name}: this {type(layer).__name__}", layer, owners)
    return layers


def along_first(values: Tensor, parameter: Tensor) -> Tensor:
    """Shape one value for each neuron, (C,) or (R, C), so that it multiplies what a parameter (C, ...) has of it."""
    return values.view(*values.shape, *[1] * (parameter.dim() - 1))


def ends_with_channels(layer: nn.Module, output: Tensor) -> bool:
    """Say whether a layer's channels are the last axis of its output, as in (B, H, W, C), and not the second one.

    A class built on a normalisation may turn its input around; there the sizes decide.
    """
    if isinstance(layer, nn.Linear):
        return True
    kinds = (nn.LayerNorm, nn.RMSNorm)
    if not isinstance(layer, kinds) or len(layer.normalized_shape) > 1:
        return False
    return type(layer) in kinds or output.shape[1] != layer.normalized_shape[0]


def _scales(norm: nn.Module) -> bool:
    return getattr(norm, "weight", None) is not None


def _before_the_logits(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    kinds = (_ConvNd, nn.Linear)
    layers = {name: layer for name, layer in modules.items() if isinstance(layer, kinds)}
    last = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)] or list(layers)
    return {
        name: layer for name, layer in layers.items() if name != last[-1] and not isinstance(layer, _ConvTransposeNd)
    }


def _check(this: str, layer: nn.Module, owners: Counter) -> None:
    if "weight" not in layer._parameters:
        raise InputError(f"{this} computes its weight (weight_norm or the like), so that no mask can act; remove that")
    if owners[id(layer._parameters["weight"])] > 1:
        raise InputError(f"{this} shares its weight with another layer, which a mask would not reach; copy the weight")
    if isinstance(layer, (_ConvNd, nn.Linear)) and not _computes_as_torch(type(layer)):
        raise InputError(f"{this} has a forward of its own, in which a mask may not act; take torch's own layer")


def _computes_as_torch(kind: type[nn.Module]) -> bool:
    """Say whether a convolution or linear layer computes what torch's own does; one that is built on it may not."""
    torchs = next(base for base in kind.__mro__ if base.__module__.startswith("torch.nn.modules."))
    return all(getattr(kind, name, None) is getattr(torchs, name, None) for name in ("forward", "_conv_forward"))
