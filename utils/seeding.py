"""Independent random streams, named instead of shared, so that any step can be repeated on its own."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seeded_generator(seed: int, *names: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator for one purpose, e.g. ``seeded_generator(seed, "batch", 17)``.

    Every purpose and every step has a stream of its own: a resumed run needs no generator state, and drawing more
    numbers in one place changes nothing in another.

    Args:
        seed: the run's seed.
        names: what the stream is for; any values with a stable ``str``.
        device: where the numbers are drawn.
    """
    text = "/".join(map(str, (seed, *names)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@contextmanager
def seeded_weights(seed: int, *names: object) -> Iterator[None]:
    """Make networks that are built on the CPU in the block start with weights that depend on seed and names alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded_generator(seed, *names).initial_seed())
        yield
