"""The attacks of step 1: a registry of functions that poison a training set.

A new attack is one module with one entry in ``ATTACKS``; the scripts do not change. Its flags, if it has any of its
own, stand in ``attacks/arguments.py``.
"""

from attacks.attack import Attack, AttackContext, PoisonedSet
from attacks.badnets import poison_badnets, poison_badnets_all
from attacks.benign import poison_benign
from attacks.blend import poison_blend
from attacks.clean_label import check_clean_label, poison_clean_label
from attacks.image_folder import check_image_folder, poison_image_folder
from attacks.input_aware import check_input_aware, poison_input_aware, train_input_aware
from attacks.sig import poison_sig

ONE_TARGET = {"poison_target": 0, "poison_rate": 0.05, "trigger_alpha": 1.0}
INPUT_AWARE = {"poison_rate": 0.1, "cross_rate": 0.1}
INPUT_AWARE_TRAINING = {
    "training": {"epoch": 600, "lr": 0.01},
    "check": check_input_aware,
    "make_trainer": train_input_aware,
}

ATTACKS = {
    "badnets": Attack(poison_badnets, ONE_TARGET),
    "badnets-all": Attack(poison_badnets_all, {"poison_rate": 0.1, "trigger_alpha": 1.0}),
    "blend": Attack(poison_blend, {**ONE_TARGET, "trigger_alpha": 0.2}),
    "sig": Attack(poison_sig, {"poison_target": 0, "poison_rate": 0.5, "sig_delta": 40.0, "sig_frequency": 6.0}),
    "clean-label": Attack(
        poison_clean_label,
        {
            "poison_target": 0,
            "poison_rate": 0.8,
            "trigger_alpha": 1.0,
            "clb_dir": None,
            "clb_surrogate": None,
            "clb_eps": 16.0,
            "clb_steps": 100,
            "clb_step_size": 1.5,
        },
        check=check_clean_label,
    ),
    "iab-one": Attack(poison_input_aware, {"poison_target": 0, **INPUT_AWARE}, **INPUT_AWARE_TRAINING),
    "iab-all": Attack(poison_input_aware, INPUT_AWARE, **INPUT_AWARE_TRAINING),
    "folder": Attack(poison_image_folder, {"poisoned_dir": None}, check=check_image_folder),
    "benign": Attack(poison_benign, {}),
}

__all__ = ["ATTACKS", "Attack", "AttackContext", "PoisonedSet"]
