"""On the real CIFAR-10, where ANP_DATA_DIR names its folder."""

import json
import os
from pathlib import Path

import pytest
import torch
from torchvision.datasets import CIFAR10

import train_backdoor_cifar
from data.augment import normalize
from data.datasets import load_dataset
from data.split import attacker_index, draw_permutation
from data.triggers import triggered_test_set
from engine.evaluation import evaluate, inference_copy
from formats.checkpoints import load_strictly, read_state_dict
from formats.trigger_file import load_trigger
from models import build_model

pytestmark = pytest.mark.real_data


def test_an_epoch_on_the_real_images(data_dir, tmp_path):
    args = ["--data-dir", data_dir, "--output-dir", str(tmp_path), "--widen-factor", "0.0625", "--epoch", "1"]
    assert train_backdoor_cifar.main(args) == 0
    card = json.loads((tmp_path / "last_model.json").read_text())
    assert card["attack"]["poisoned_images"] == pytest.approx(0.05 * 40_500, abs=15)
    assert card["metrics"]["clean_accuracy"] > 25
    dataset = load_dataset("cifar10", data_dir)
    assert list(dataset.classes) == CIFAR10(data_dir).classes
    assert len(attacker_index(draw_permutation(len(dataset.train)))) == 45_000
    assert len(triggered_test_set(dataset.test, load_trigger(tmp_path / "trigger_info.th", 10))) == 9_000
    pixels = normalize(dataset.train.images[::25], dataset.normalization)
    assert pixels.mean((0, 2, 3)).abs().max() < 0.05  # of 2,000 images


def test_a_published_checkpoint(data_dir):
    folder = Path(os.environ.get("ANP_CHECKPOINT_DIR", ""))
    if not (folder / "resnet18_badnets.th").exists():
        pytest.skip("ANP_CHECKPOINT_DIR names no folder with resnet18_badnets.th")
    network = build_model("resnet18")
    load_strictly(network, read_state_dict(folder / "resnet18_badnets.th"), "resnet18_badnets.th")
    dataset = load_dataset("cifar10", data_dir)
    clean = dataset.test[torch.arange(500)]
    triggered = triggered_test_set(clean, load_trigger(folder / "trigger_info.th", 10))
    folded = inference_copy(network, torch.float32)
    assert evaluate(folded, clean, dataset.normalization, torch.float32).accuracy == pytest.approx(0.9, abs=0.04)
    assert evaluate(folded, triggered, dataset.normalization, torch.float32).accuracy > 0.99
