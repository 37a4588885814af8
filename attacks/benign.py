"""No attack: the network that the others are compared with."""

from attacks.attack import AttackContext, PoisonedSet


def poison_benign(context: AttackContext) -> PoisonedSet:
    """Return the clean training set."""
    return PoisonedSet(context.dataset.train[context.train_index], None)
