"""No attack: the network that the others are compared with."""

from dataclasses import dataclass

import torch

from attacks.attack import Attack, PoisonedSet
from data.datasets import ImageSet


@dataclass(frozen=True)
class Benign(Attack):
    """Leaves the training set as it is."""

    def poison(self, train: ImageSet, seed: int = 0) -> PoisonedSet:
        """See ``Attack``."""
        return PoisonedSet(train, None, torch.zeros(0, dtype=torch.int64))
