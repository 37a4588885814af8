"""One training in several processes: the same updates as in one, one writer, and an end of all with any of them."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import engine.memory as memory
import engine.parallel as parallel
import train_backdoor_cifar as train
from data.datasets import CIFAR10_NORMALIZATION, ImageSet
from engine.training import SgdLoop, TrainConfig
from models import ModelConfig, build_model
from tests.small import interrupt_after
from utils.errors import InputError
from utils.table import read_table

ROOT = Path(__file__).parents[1]
# Smooth: a ReLU turns the rounding of a number near 0 into a gradient that is there or not. In the batch that a test
# names it ends its own process, or torchrun; torchrun takes a moment until it ends the others.
CODE = """
import os, signal, time
from torch import nn

def now(name, batches):
    return os.environ.get(name) == f"{os.environ.get('RANK')} {batches}"

class Network(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.batches, self.unused = 0, nn.Linear(2, 2)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.Tanh(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, num_classes))

    def forward(self, x):
        self.batches += self.training
        if self.training and now("KILL", self.batches):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.training and now("STOP", self.batches):
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(2)
        return self.body(x)
"""
# A port is free when torchrun chooses it, and may be taken when it is used: then another try is due.
TAKEN = r"processes cannot meet|address already in use|EADDRINUSE|DistNetworkError|Rendezvous\w+Error"
LOST = "train: error: another process of this training has ended; continue with --resume"


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Of step 1: 2 epochs of 7 batches of 77 images, 39 and 38 in two processes, and one of a single image."""
    code = tmp_path_factory.mktemp("code") / "net.py"
    code.write_text(CODE)
    options = ["--dataset", "tiny", "--epoch", "2", "--batch-size", "77", "--lr", "0.05", "--poison-rate", "0.2"]
    return ["--model", f"{code}:Network", *options, "--precision", "fp32", "--device", "cpu", "--threads", "1"]


def torchrun(folder, flags, *more, **environment):
    """Run step 1 in two processes; returns its status, what it printed, and what it complained of."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tests/small.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command += ["train", "--output-dir", str(folder), *flags, *more]
    for _ in range(3):
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        if not re.search(TAKEN, done.stderr):
            break
    print(done.stderr)  # shown where a test fails
    return done.returncode, done.stdout, re.findall(r"^(?:train|process).*", done.stderr, re.MULTILINE)


@pytest.fixture(scope="module")
def both(flags, tmp_path_factory):
    """The same training in one process and in two: a folder each, and what two printed."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    assert train.main(["--output-dir", str(one), *flags]) == 0
    status, out, complaints = torchrun(two, flags)
    assert status == 0 and complaints == [], complaints
    return one, two, out


def test_two_processes_make_the_updates_of_one(both):
    one, two = (torch.load(folder / "last_model.th") for folder in both[:2])
    start = torch.load(both[0] / "model_init.th")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-5, rtol=2e-5, msg=name)
        assert "unused" in name or not torch.equal(value, start[name]), "what stays says nothing"
    rows = [read_table(folder / "train_log.jsonl")[1] for folder in both[:2]]
    for row, other in zip(*rows, strict=True):
        assert row["seconds"] and other == pytest.approx({**row, "seconds": other["seconds"]}, rel=1e-4)


def test_one_process_writes_and_prints(both):
    one, two, out = both
    names = [{path.name for path in folder.iterdir()} for folder in (one, two)]
    assert names[0] == names[1]
    lines = [line.split()[:2] for line in out.splitlines()]
    for once in (["computing", "on"], ["2", "processes,"], ["epoch", "lr"], ["1", "0.05000"], ["2", "0.05000"]):
        assert lines.count(once) == 1, out


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_resume_goes_on(both, flags, tmp_path):
    status, _, complaints = torchrun(tmp_path, flags, KILL="1 11")
    assert status != 0 and complaints == [LOST]
    status, _, complaints = torchrun(tmp_path, flags, "--resume", KILL="0 2")
    assert status != 0 and complaints == [], "the other one has nothing to say"
    status, _, complaints = torchrun(tmp_path, flags, "--resume")
    assert status == 0, complaints
    assert (tmp_path / "last_model.th").read_bytes() == (both[1] / "last_model.th").read_bytes()
    status, out, complaints = torchrun(tmp_path, flags, "--resume")
    assert status == 0 and complaints == [], "nor does it wait where there is nothing to do"
    assert out.count("nothing to resume") == 1


def test_processes_of_torchrun_end_before_python_is_taken_down():
    code = "import atexit; from utils.console import leave; atexit.register(print, 'down'); print('out'); leave(3)"
    for variables, out in (({}, "out\ndown\n"), ({"TORCHELASTIC_RUN_ID": "none"}, "out\n")):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (3, out, "")


@pytest.mark.slow
def test_a_signal_waits_for_the_update_of_all_and_resume_goes_on(both, flags, tmp_path):
    status, _, complaints = torchrun(tmp_path, flags, STOP="0 11")
    assert status != 0 and complaints == [f"train: interrupted; continue with --resume ({tmp_path}/train_resume.th)"]
    assert torch.load(tmp_path / "train_resume.th")["loop"]["done"] == 11, "and no state of before is left"
    status, _, complaints = torchrun(tmp_path, flags, "--resume")
    assert status == 0, complaints
    assert (tmp_path / "last_model.th").read_bytes() == (both[1] / "last_model.th").read_bytes()


def test_a_run_goes_on_with_as_many_processes(flags, tmp_path, monkeypatch, capsys):
    args = ["--output-dir", str(tmp_path), *flags]
    with monkeypatch.context() as patch:
        patch.setattr(train, "processes", lambda: 2)
        interrupt_after(patch, 3)
        assert train.main(args) == 130
    capsys.readouterr()
    assert train.main([*args, "--resume"]) == 1
    assert "processes is 1 but was 2 in the run to resume" in capsys.readouterr().err


# ---- what does not go


def loop_of(network):
    pixels = torch.randint(256, (8, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return SgdLoop(network, ImageSet(pixels, torch.arange(8), 10), CIFAR10_NORMALIZATION, True, TrainConfig())


class OwnNorm(nn.BatchNorm2d):
    """A BatchNorm of somebody's own."""


def test_a_process_that_is_alone_trains_as_ever():
    loop = loop_of(nn.Conv2d(3, 4, 3))
    assert parallel.processes() == 1 and parallel.spread(loop, ModelConfig()) is loop


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}])
def test_only_torchrun_makes_several_processes(variables, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert parallel.join() == 0 and not dist.is_initialized()


def test_processes_that_cannot_meet(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", raising(dist.DistNetworkError("no host\nframe #0")))
    with pytest.raises(SystemExit) as caught:
        parallel.join()
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("torchrun: error: the processes cannot meet (no host); look")


def test_input_aware_attacks_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    args = ["--output-dir", str(tmp_path), "--dataset", "tiny", "--widen-factor", "0.0625", "--threads", "1"]
    assert train.main([*args, "--poison-type", "iab-one", "--generator-width", "0.125"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "leave out torchrun" in error
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


def test_a_batchnorm_of_ones_own_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    loop = loop_of(nn.Sequential(nn.Conv2d(3, 4, 3), OwnNorm(4)))
    with pytest.raises(InputError, match="1: OwnNorm cannot be computed by several processes"):
        parallel.spread(loop, ModelConfig())


@pytest.mark.parametrize(
    ("device", "count", "message"),
    [("cuda:0", 4, "4 processes but 2 CUDA devices"), ("cuda:1", 2, "--device cuda:1: the processes of torchrun")],
)
def test_every_process_needs_a_gpu_to_itself(device, count, message, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=message):
        parallel._check_devices(torch.device(device))


def test_memory_is_counted_by_process(monkeypatch):
    images, found = loop_of(nn.Conv2d(3, 4, 3)).train, []
    network = build_model("resnet18", 10, 1 / 16)
    monkeypatch.setattr(memory, "check_memory", lambda needed, *rest: found.append(needed))
    for count, kind in ((1, "cpu"), (4, "cpu"), (4, "cuda")):
        monkeypatch.setattr(memory, "processes", lambda count=count: count)
        runtime = SimpleNamespace(device=torch.device(kind), precision=torch.float32)
        memory.check_step(lambda network, batch, *rest: 1000 * batch, network, 100, runtime, images, copies=1)
    assert found == [100_000 + images.images.nbytes, 4 * (25_000 + images.images.nbytes), 25_000 + images.images.nbytes]


# ---- the others


@pytest.fixture
def follower(monkeypatch):
    """A way to say what ``follow`` receives, in a process whose signals stay; it is not to hear any."""
    deaf = []
    monkeypatch.setattr(parallel, "ignore_all", lambda: deaf.append(True))
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    yield lambda receive: monkeypatch.setattr(parallel, "_receive", lambda: receive() if deaf else pytest.fail("hears"))


def raising(error):
    def fail(*args, **options):
        raise error

    return fail


def test_the_others_end_silently_with_the_first(follower, capsys):
    follower(raising(RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")))
    assert parallel.follow() == 0 and capsys.readouterr() == ("", "")


def test_the_others_say_what_is_wrong_with_them(follower, capsys):
    follower(raising(InputError("no such thing")))
    assert parallel.follow() == 1 and capsys.readouterr().err == "process 3: error: no such thing\n"
    follower(raising(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
    assert parallel.follow() == 1 and "process 3: error: out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "name"), [("cpu", "cpu"), ("cuda", "cuda:2")])
def test_every_process_takes_the_device_of_its_number(kind, name, follower, monkeypatch):
    taken = []

    def prepare(config):
        taken.append(config)
        raise parallel.ProcessLost("here")

    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(parallel, "prepare_runtime", prepare)
    loop = loop_of(nn.Conv2d(3, 4, 3))
    task = parallel._Task(ModelConfig(), loop.train, loop.normalization, True, loop.config, kind, 5)
    follower(lambda: task)
    assert parallel.follow() == 0 and [(config.device, config.threads) for config in taken] == [(name, 5)]


# ---- BatchNorm over all processes


@pytest.fixture
def group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(6),
        nn.BatchNorm2d(6),
        nn.BatchNorm3d(6),
        nn.BatchNorm2d(6, momentum=None),
        nn.BatchNorm2d(6, affine=False, eps=0.1),
        nn.BatchNorm2d(6, track_running_stats=False),
        nn.BatchNorm2d(6).eval(),
    ],
    ids=str,
)
def test_batchnorm_over_all_processes(norm, dtype, group):
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)
    other = copy.deepcopy(norm)
    other.__class__ = parallel.GlobalBatchNorm
    generator = torch.Generator().manual_seed(0)
    places = {"1": (), "2": (3, 4), "3": (3, 4, 2)}[type(norm).__name__[9]]
    for _ in range(2):
        x = (5 + torch.randn(7, 6, *places, generator=generator)).to(dtype)
        x, weights = x.requires_grad_(), torch.randn(x.shape, generator=generator)
        results = []
        for each in (norm, other):
            y = each(x)
            gradients = torch.autograd.grad((y.float() * weights).sum(), [x, *each.parameters()])
            results.append([y, *gradients, *(buffer.clone() for buffer in each.buffers())])
        assert results[0][0].dtype == results[1][0].dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(results[1], results[0], atol=tolerance, rtol=tolerance)


def test_the_networks_tensors_are_shared_and_its_layers_stay(network):
    shared = parallel.synchronised(network.eval(), None)
    tensors = [{**dict(each.named_parameters()), **dict(each.named_buffers())} for each in (network, shared)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(tensors[1][name] is tensor for name, tensor in tensors[0].items())
    kinds = [{type(module) for module in each.modules()} for each in (network, shared)]
    assert nn.BatchNorm2d in kinds[0] and parallel.GlobalBatchNorm not in kinds[0]
    assert parallel.GlobalBatchNorm in kinds[1] and nn.BatchNorm2d not in kinds[1]
    assert shared.training and not network.training


def test_nothing_is_recorded(group, monkeypatch):
    """A recording would hold what the processes exchange."""
    monkeypatch.setattr("engine.training.replayed", raising(AssertionError("recorded")))
    loop = loop_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 14 * 14, 10)))
    config = TrainConfig(epochs=1, batch_size=3)
    steps = parallel.ParallelLoop(loop.network, loop.train, loop.normalization, True, config).steps()
    assert [next(steps) for _ in range(3)] == [3, 3, 2]


def test_only_what_a_lost_process_causes_is_taken_for_one(monkeypatch):
    monkeypatch.setattr(parallel, "ignore_all", lambda: None)
    for error in (RuntimeError("gloo: Connection reset by peer"), dist.DistBackendError("NCCL error")):
        with pytest.raises(parallel.ProcessLost), parallel._together():
            raise error
    with pytest.raises(RuntimeError, match="of size 3"), parallel._together():
        raise RuntimeError("shapes of size 3 and 4")
