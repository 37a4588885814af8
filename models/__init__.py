"""Networks by name, neurons, and the layers that ANP masks and perturbs."""

from models.neurons import Neuron, mask_values, neurons_up_to, prune_neurons
from models.noisy_layers import NoisyBatchNorm, NoisyLayer, convert_noisy, noisy_layers
from models.registry import ARCHITECTURES, ModelConfig, build_model

__all__ = [
    "ARCHITECTURES",
    "ModelConfig",
    "Neuron",
    "NoisyBatchNorm",
    "NoisyLayer",
    "build_model",
    "convert_noisy",
    "mask_values",
    "neurons_up_to",
    "noisy_layers",
    "prune_neurons",
]
