"""Adversarial Neuron Pruning, callable from Python on any network; no files, no printing, no trigger, no test set."""

from defenses.anp import AnpConfig, AnpState, AnpStep, optimize_masks, score
from models.neurons import Neuron, mask_values, neurons_up_to, prune_neurons

__all__ = [
    "AnpConfig",
    "AnpState",
    "AnpStep",
    "Neuron",
    "mask_values",
    "neurons_up_to",
    "optimize_masks",
    "prune_neurons",
    "score",
]
