"""Adversarial Neuron Pruning, callable from Python on any network; no files, no printing, no trigger, no test set."""

from defenses.anp import AnpConfig, AnpState, AnpStep, optimize_masks, score
from defenses.one_call import Repaired, repair
from defenses.pruning import ChoiceConfig
from models.neurons import Neuron, mask_values, neurons_up_to, prune_neurons

__all__ = [
    "AnpConfig",
    "AnpState",
    "AnpStep",
    "ChoiceConfig",
    "Neuron",
    "Repaired",
    "mask_values",
    "neurons_up_to",
    "optimize_masks",
    "prune_neurons",
    "repair",
    "score",
]
