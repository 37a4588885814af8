"""The defences, callable from Python on any network; no files, no printing, no trigger, no test set.

ANP is ``repair``, or step by step ``optimize_masks`` and ``prune_neurons``. The others are configs with a ``repair`` of
their own, by the names of ``--defense``; a new one is one module with one class and one entry in ``DEFENSES``.
"""

from defenses.anp import AnpConfig, AnpState, AnpStep, optimize_masks, score, show_masks
from defenses.attention_distillation import AttentionDistillation
from defenses.ban import NoisyTuning
from defenses.channel_lipschitz import ChannelLipschitz
from defenses.defense import Defense
from defenses.fine_pruning import FinePruning
from defenses.fine_tuning import FineTuning
from defenses.mode_connectivity import ModeConnectivity
from defenses.one_call import Repaired, repair
from defenses.pruning import ChoiceConfig
from defenses.sharpness_aware import SharpnessAware
from models.neurons import Neuron, mask_values, neurons_up_to, prune_neurons

DEFENSES: dict[str, type[Defense]] = {
    "ft": FineTuning,
    "fp": FinePruning,
    "mcr": ModeConnectivity,
    "nad": AttentionDistillation,
    "clp": ChannelLipschitz,
    "ft-sam": SharpnessAware,
    "ban": NoisyTuning,
}

__all__ = [
    "DEFENSES",
    "AnpConfig",
    "AnpState",
    "AnpStep",
    "AttentionDistillation",
    "ChannelLipschitz",
    "ChoiceConfig",
    "Defense",
    "FinePruning",
    "FineTuning",
    "ModeConnectivity",
    "Neuron",
    "NoisyTuning",
    "Repaired",
    "SharpnessAware",
    "mask_values",
    "neurons_up_to",
    "optimize_masks",
    "prune_neurons",
    "repair",
    "score",
    "show_masks",
]
