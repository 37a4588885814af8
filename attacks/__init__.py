"""The attacks of step 1, by the names of ``--poison-type``, each callable from Python in one line.

A new attack is one module with one class and one entry in ``ATTACKS``; its flags are made from the class's fields.
"""

from attacks.attack import Attack, PoisonedSet, Workspace
from attacks.badnets import BadNets, BadNetsAllToAll
from attacks.benign import Benign
from attacks.blend import Blend
from attacks.clean_label import CleanLabel
from attacks.image_folder import ImageFolder
from attacks.input_aware import InputAwareAllToAll, InputAwareOne
from attacks.sig import Sig

ATTACKS: dict[str, type[Attack]] = {
    "badnets": BadNets,
    "badnets-all": BadNetsAllToAll,
    "blend": Blend,
    "sig": Sig,
    "clean-label": CleanLabel,
    "iab-one": InputAwareOne,
    "iab-all": InputAwareAllToAll,
    "folder": ImageFolder,
    "benign": Benign,
}

__all__ = [
    "ATTACKS",
    "Attack",
    "BadNets",
    "BadNetsAllToAll",
    "Benign",
    "Blend",
    "CleanLabel",
    "ImageFolder",
    "InputAwareAllToAll",
    "InputAwareOne",
    "PoisonedSet",
    "Sig",
    "Workspace",
]
