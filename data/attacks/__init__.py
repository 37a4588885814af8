"""The attacks of step 1: a registry of functions that poison a training set.

A new attack is one module with one entry in ``ATTACKS``; the scripts do not change.
"""

from data.attacks.attack import Attack, AttackConfig, PoisonedSet
from data.attacks.badnets import badnets
from data.attacks.blend import blend
from data.attacks.clean_label import clean_label

ATTACKS = {
    "badnets": Attack(badnets, default_alpha=1.0),
    "blend": Attack(blend, default_alpha=0.2),
    "clean-label": Attack(clean_label, default_alpha=1.0, needs_folder=True),
    "benign": None,
}

__all__ = ["ATTACKS", "Attack", "AttackConfig", "PoisonedSet"]
