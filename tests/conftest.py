import os
from pathlib import Path

import pytest
import torch

from data.datasets import DATASETS
from tests.small import register

WIDTH = ["--widen-factor", "0.125"]


@pytest.fixture(scope="session", autouse=True)
def datasets():
    register("tiny", 600, 200)
    register("small", 4000, 1000)
    yield
    del DATASETS["tiny"], DATASETS["small"]


@pytest.fixture
def network():
    """A ResNet-18 of 1/16 of the width whose BatchNorms are not the identity."""
    from models import build_model

    torch.manual_seed(0)
    network = build_model("resnet18", 10, 1 / 16)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return network


@pytest.fixture(scope="session")
def data_dir():
    """The folder with the real CIFAR-10."""
    folder = os.environ.get("ANP_DATA_DIR", "")
    if not (Path(folder) / "cifar-10-batches-py").is_dir() or not folder:
        pytest.skip("ANP_DATA_DIR names no folder with cifar-10-batches-py")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Step 1 and 2 on the tiny set: a folder to copy, too short to mean anything."""
    import optimize_mask_cifar
    import train_backdoor_cifar

    folder = tmp_path_factory.mktemp("trained")
    common = ["--output-dir", str(folder), "--precision", "fp32"]
    assert train_backdoor_cifar.main([*common, *WIDTH, "--dataset", "tiny", "--epoch", "1"]) == 0
    source = ["--checkpoint", str(folder / "last_model.th"), "--trigger-info", str(folder / "trigger_info.th")]
    options = ["--val-frac", "0.1", "--nb-iter", "4", "--print-every", "2", "--batch-size", "32"]
    assert optimize_mask_cifar.main([*common, *source, *options]) == 0
    return folder
