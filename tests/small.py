"""A small synthetic dataset for the tests, and the scripts on it as a program that can be killed.

python tests/small.py train --epoch 2 ...
"""

if __name__ == "__main__":  # as the scripts do
    from utils.console import prepare_process

    prepare_process()

import os
import signal
import sys

import optimize_mask_cifar
import prune_neuron_cifar
import train_backdoor_cifar
from data.datasets import DATASETS, SYNTHETIC_NORMALIZATION, Dataset, ImageSet
from data.synthetic import CLASSES, draw_images
from engine.drive import Means
from utils import run
from utils.console import leave


def register(name: str, train: int, test: int) -> None:
    """Add a synthetic dataset of another size to the registry."""
    parts = ImageSet(*draw_images(train, "train"), 10), ImageSet(*draw_images(test, "test"), 10)
    DATASETS[name] = lambda root: Dataset(name, SYNTHETIC_NORMALIZATION, True, CLASSES, *parts)


def interrupt_after(patch, batches):
    """Send this process a SIGINT in the middle of a training step."""
    counted, original = [], Means.add

    def add(means, *values, **weight):
        original(means, *values, **weight)
        counted.append(1)
        if len(counted) == batches:
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(Means, "add", add)


def main() -> int:
    """Run the script that the first argument names."""
    run.SAVE_SECONDS = 0.0  # so that a kill at any moment finds a state of a moment ago
    register("tiny", 600, 200)
    scripts = {"train": train_backdoor_cifar, "optimize": optimize_mask_cifar, "prune": prune_neuron_cifar}
    return scripts[sys.argv[1]].main(sys.argv[2:])


if __name__ == "__main__":
    leave(main())
