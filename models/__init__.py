"""Networks by name, the BatchNorm that ANP masks and perturbs, and neurons."""

from models.neurons import Neuron, mask_values, neurons_up_to, prune_neurons
from models.noisy_batchnorm import NoisyBatchNorm, convert_noisy_batchnorm, noisy_layers
from models.registry import ARCHITECTURES, ModelConfig, build_model

__all__ = [
    "ARCHITECTURES",
    "ModelConfig",
    "Neuron",
    "NoisyBatchNorm",
    "build_model",
    "convert_noisy_batchnorm",
    "mask_values",
    "neurons_up_to",
    "noisy_layers",
    "prune_neurons",
]
