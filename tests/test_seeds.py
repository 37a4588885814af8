"""Several mask optimisations of one network at once: each is what it is alone."""

import io
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import optimize_mask_cifar as optimize
import prune_neuron_cifar as prune
from data.datasets import CIFAR10_NORMALIZATION, ImageSet
from data.synthetic import draw_images
from defenses import AnpConfig, AnpState, mask_values, optimize_masks
from defenses import anp as module
from defenses.anp import MaskLoop, show_masks
from engine.cuda_graph import record
from engine.evaluation import Metrics, Report, Reports
from formats.subject import Subject
from models import convert_noisy
from tests.replay import Replay
from tests.small import interrupt_after
from utils import machine
from utils.errors import InputError

CONFIG = AnpConfig(batch_size=16, iterations=4)
SEEDS = [replace(CONFIG, seed=seed) for seed in (3, 0, 8)]
STRENGTHS = [replace(CONFIG, eps=eps, alpha=alpha) for eps, alpha in ((0.4, 0.2), (0.1, 0.9), (0.0, 0.5))]
MASKS = ["--val-frac", "0.1", "--nb-iter", "4", "--print-every", "2", "--batch-size", "32", "--precision", "fp32"]


@pytest.fixture
def images():
    return torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels():
    return torch.arange(40) % 10


def learn(network, images, labels, config):
    """Return the steps, and the masks and momenta of all runs."""
    noisy = convert_noisy(network)
    state = AnpState.start(noisy, len(module.runs_of(config)))
    steps = list(optimize_masks(noisy, images, labels, config, state=state))
    return steps, state.mask, state.momentum


def check_each(network, images, labels, configs):
    """Compare every run with itself alone."""
    steps, masks, _ = learn(network, images, labels, configs)
    # With several steps a gradient near 0 may take the other sign for rounding, and its noise another path.
    loss_tolerance, mask_tolerance = (1e-4, 2e-4) if configs[0].steps == 1 else (2e-2, 2e-2)
    for run, config in enumerate(configs):
        own_steps, own_mask, _ = learn(network, images, labels, config)
        torch.testing.assert_close(masks[run], own_mask[0], atol=mask_tolerance, rtol=0)
        for step, own in zip(steps, own_steps, strict=True):
            for name in ("loss", "natural_loss", "perturbed_loss", "accuracy"):
                value, alone = getattr(step, name), getattr(own, name)
                assert value.shape == (len(configs),) and alone.shape == (1,)
                assert value[run].item() == pytest.approx(alone.item(), rel=loss_tolerance), name
    differences = [(one - other).abs().max() for one, other in itertools.combinations(masks, 2)]
    assert min(differences) > 10 * mask_tolerance or configs[0].steps > 1, "else nothing is compared"


@pytest.mark.parametrize("configs", [SEEDS, STRENGTHS, [replace(each, steps=2, project=True) for each in SEEDS]])
def test_every_run_is_what_it_is_alone(network, images, labels, configs):
    check_each(network.to(memory_format=torch.channels_last), images, labels, configs)


class NormAct(nn.BatchNorm1d):
    """A BatchNorm with a forward of its own."""

    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, NormAct])
def test_batchnorms_of_every_kind(norm, bias):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), norm(8), nn.Linear(8, 3))
    if not bias:
        network[1].register_parameter("bias", None)
    check_each(network, torch.randn(20, 6), torch.arange(20) % 3, SEEDS)


def test_one_setting_in_a_list_is_one_run(network, images, labels):
    alone, listed = (learn(network, images, labels, config) for config in (CONFIG, [CONFIG]))
    ours = [[tuple(vars(step).values()) for step in steps] + rest for steps, *rest in (alone, listed)]
    assert all(map(torch.equal, *(map(torch.as_tensor, tree_leaves(each)) for each in ours)))


def test_the_masks_of_one_run_are_shown(network, images, labels):
    noisy = convert_noisy(network)
    state = AnpState.start(noisy, 3)
    list(optimize_masks(noisy, images, labels, SEEDS, state=state))
    assert noisy.bn1.mask.shape == (3, 4)
    show_masks(noisy, state.mask[1])
    assert torch.equal(noisy.bn1.mask, state.mask[1, :4])
    assert [neuron.mask for neuron in mask_values(noisy)] == pytest.approx(state.mask[1].tolist(), abs=6e-5)


def test_a_recorded_optimisation_is_the_optimisation(network, images, labels, monkeypatch):
    def run():
        steps, *state = learn(network, images, labels, SEEDS)
        return [tuple(vars(step).values()) for step in steps], state

    expected = run()
    monkeypatch.setattr(module, "replayed", lambda iterate, changed, batch: record(iterate, changed, batch, Replay()))
    for ours, eager in zip(tree_leaves(run()), tree_leaves(expected), strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(eager))


# ---- what cannot go together


class Mixing(nn.Module):
    """Subtracts the mean over the batch."""

    def forward(self, x):
        return x - x.mean(0)


NO_BATCHNORM = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(10))
NO_BATCHNORM(torch.zeros(2, 3, 32, 32))
TAIL = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Nested(nn.BatchNorm2d):
    """Its forward uses another BatchNorm."""

    def __init__(self, channels):
        super().__init__(channels)
        self.inner = nn.BatchNorm2d(channels)

    def forward(self, x):
        return super().forward(self.inner(x))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (NO_BATCHNORM, "0: several seeds at once need BatchNorms"),
        (nn.Sequential(Nested(3), TAIL), "0: several seeds at once need BatchNorms that hold no other neurons"),
        (nn.Sequential(TAIL, Mixing()), "Sequential mixes the images of a batch"),
        (nn.Sequential(nn.BatchNorm2d(3, affine=False, track_running_stats=False), TAIL), "mixes the images"),
    ],
)
def test_networks_that_know_no_runs(network, message, images, labels):
    noisy = convert_noisy(network)
    with pytest.raises(InputError, match=message):
        next(optimize_masks(noisy, images, labels % 4, SEEDS))
    assert len(list(optimize_masks(convert_noisy(network), images, labels % 4, CONFIG))) == 4, "one run is no problem"


def test_a_network_that_is_not_finite_mixes_nothing(network, images, labels):
    network.conv1.weight.data.fill_(torch.nan)
    next(optimize_masks(convert_noisy(network), images, labels, SEEDS))


@pytest.mark.parametrize("changes", [{"lr": 0.1}, {"batch_size": 8}, {"steps": 2}, {"iterations": 5}])
def test_settings_that_do_not_go_together(network, images, labels, changes):
    with pytest.raises(ValueError, match="seed, eps and alpha alone"):
        next(optimize_masks(convert_noisy(network), images, labels, [CONFIG, replace(CONFIG, **changes)]))


def test_no_settings(network, images, labels):
    with pytest.raises(ValueError, match="an AnpConfig for each run"):
        next(optimize_masks(convert_noisy(network), images, labels, []))


@pytest.mark.parametrize("count", [2, 7])
def test_a_batch_that_is_no_multiple(count):
    noisy = convert_noisy(nn.BatchNorm1d(4))
    noisy.mask = torch.ones(3, 4)
    assert noisy(torch.randn(6, 4)).shape == (6, 4)
    with pytest.raises((ValueError, RuntimeError)):
        noisy(torch.randn(count, 4))


# ---- as the script runs it


def loop_of(network, configs, **options):
    clean = ImageSet(draw_images(40, "train")[0], torch.arange(40) % 10, 10)
    return MaskLoop(Subject(network, CIFAR10_NORMALIZATION, True, clean, {}), configs, **options)


def test_rows_are_means_over_runs(network):
    configs = [replace(config, lr=2.0) for config in SEEDS]
    together, alone = loop_of(network, configs, row_every=4), [loop_of(network, each, row_every=4) for each in configs]
    row, *others = (next(loop.row() for _ in loop.steps() if loop.due()) for loop in (together, *alone))
    for name in ("loss", "natural loss", "perturbed loss", "batch acc %", "masks <= 0.2"):
        assert row[name] == pytest.approx(sum(other[name] for other in others) / 3, rel=0.02), name
    assert len({other["masks <= 0.2"] for other in others}) > 1 and row["iteration"] == 4
    assert format(row["masks <= 0.2"], together.columns["masks <= 0.2"])


def test_a_saved_loop_goes_on_exactly(network):
    through, broken, resumed = (loop_of(network, SEEDS) for _ in range(3))
    list(through.steps())
    for _ in itertools.islice(broken.steps(), 2):
        pass
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    list(resumed.steps())
    assert torch.equal(resumed.state.mask, through.state.mask) and through.state.mask.shape[0] == 3
    assert len({tuple(through.neurons(run)) for run in range(3)}) == 3


def test_masked_is_the_network_with_the_masks_of_one_run(network, images):
    loop = loop_of(network, SEEDS)
    loop.state.mask.copy_(torch.rand(loop.state.mask.shape, generator=torch.Generator().manual_seed(1)))
    for run in (2, 0, 1):
        own = convert_noisy(network).eval()
        show_masks(own, loop.state.mask[run])
        torch.testing.assert_close(loop.masked(run).eval()(images), own(images), atol=1e-4, rtol=1e-4)


def test_a_row_of_reports_holds_means_and_each():
    def report(share):
        return Report(Metrics(2 * share, share), None, Metrics(0, share / 2))

    row = Reports({"4": report(0.5), "7": report(1.0)}).row()
    assert row["C-Acc %"] == 75 and row["clean loss"] == 1.5 and row["defender acc %"] == 37.5
    assert row["by seed"] == {"4": report(0.5).row(), "7": report(1.0).row()}
    assert Reports({"4": report(0.1)}).row() == report(0.1).row(), "one seed has nothing to add"


def flags_of(folder, *flags):
    return ["--checkpoint", f"{folder}/last_model.th", "--trigger-info", f"{folder}/trigger_info.th", *flags]


def run(folder, out, *flags):
    return optimize.main(["--output-dir", str(out), *flags_of(folder), *MASKS, *flags])


def read(folder):
    record, *rows = map(json.loads, (folder / "optimize_log.jsonl").read_text().splitlines())
    return record["record"], rows


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {".lock"}


@pytest.fixture(scope="module")
def together(trained, tmp_path_factory):
    """Seeds 0 and 5 at once; seed 0 alone is the folder ``trained``."""
    out = tmp_path_factory.mktemp("together")
    assert run(trained, out, "--seeds", "5", "0") == 0
    return out


@pytest.fixture
def folder(together, tmp_path):
    """A copy, to be changed."""
    return Path(shutil.copytree(together, tmp_path / "save"))


def masks_in(path):
    return torch.tensor([float(line.split("\t")[3]) for line in path.read_text().splitlines()[1:]])


def test_every_seed_writes_what_it_writes_alone(trained, together, tmp_path):
    assert run(trained, tmp_path / "alone", "--seed", "5") == 0
    for seed, alone in ((5, tmp_path / "alone"), (0, trained)):
        ours, own = (place / "mask_values.txt" for place in (together / f"seed-{seed}", alone))
        torch.testing.assert_close(masks_in(ours), masks_in(own), atol=3e-4, rtol=0)
        card, own_card = (json.loads(path.with_suffix(".json").read_text()) for path in (ours, own))
        assert {**card, "sha256": ""} == {**own_card, "sha256": ""}
        (_, rows), (_, own_rows) = read(together), read(alone)
        for row, own_row in zip(rows, own_rows, strict=True):
            figures = row["by seed"][str(seed)]
            assert figures == pytest.approx({name: own_row[name] for name in figures}, rel=0.02, abs=0.6)
    assert not torch.equal(*(masks_in(together / f"seed-{seed}/mask_values.txt") for seed in (0, 5)))
    written = {f"mask_values.{kind}" for kind in ("txt", "json", "png", "pdf")}
    assert files_of(together) == {"optimize_log.jsonl", *(f"seed-{seed}/{name}" for seed in (0, 5) for name in written)}


def test_the_table_shows_means(together):
    record, rows = read(together)
    assert record["arguments"]["seeds"] == [5, 0] and record["arguments"]["seed"] is None
    assert [row["iteration"] for row in rows] == [0, 2, 4]
    for row in rows:
        assert row["C-Acc %"] == pytest.approx(sum(each["C-Acc %"] for each in row["by seed"].values()) / 2)


def test_one_seed_of_several(trained, tmp_path):
    assert run(trained, tmp_path, "--seeds", "0") == 0
    own, ours = trained / "mask_values.txt", tmp_path / "seed-0/mask_values.txt"
    assert ours.read_bytes() == own.read_bytes() and "by seed" not in read(tmp_path)[1][0]


def test_interrupted_and_resumed(trained, together, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert run(trained, tmp_path, "--seeds", "5", "0") == 130
    assert run(trained, tmp_path, "--seeds", "5", "1", "--resume") == 1
    assert "--seeds is [5, 1] but was [5, 0] before, in the run to resume" in capsys.readouterr().err
    assert run(trained, tmp_path, "--seeds", "5", "0", "--resume") == 0
    for seed in (0, 5):
        name = f"seed-{seed}/mask_values.txt"
        assert (tmp_path / name).read_bytes() == (together / name).read_bytes()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("mask_values.*")}
    assert run(trained, tmp_path, "--seeds", "5", "0", "--resume") == 0
    assert "this run is complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("mask_values.*")}
    (tmp_path / "seed-5/mask_values.txt").unlink()
    assert run(trained, tmp_path, "--seeds", "5", "0", "--resume") == 1, "no longer complete"


def test_overwriting_takes_the_folders_of_seeds_along(trained, folder, capsys):
    mask_file = folder / "seed-5/mask_values.txt"
    sweep = ["--pruning-max", "0.1", "--pruning-step", "0.1", "--val-frac", "0.1", "--mask-file", str(mask_file)]
    assert prune.main(["--output-dir", str(mask_file.parent), *flags_of(trained), *sweep, "--precision", "fp32"]) == 0
    assert (folder / "seed-5/repaired_model.th").exists()
    (folder / "seed-5/mine.txt").touch()
    before = files_of(folder)
    for flags in (["--seeds", "5", "0"], ["--seeds", "1"], []):
        assert run(trained, folder, *flags) == 1
        assert f"{folder}/seed-0/mask_values.txt is there already" in capsys.readouterr().err
    assert run(trained, folder, "--overwrite", "--checkpoint", f"{folder}/seed-5/repaired_model.th") == 1
    assert "repaired_model.th would be overwritten" in capsys.readouterr().err
    assert files_of(folder) == before
    assert run(trained, folder, "--overwrite") == 0
    kept = {name for name in before if name.endswith((".lock", "mine.txt"))}
    assert files_of(folder) == {
        "optimize_log.jsonl",
        *(f"mask_values.{k}" for k in ("txt", "json", "png", "pdf")),
        *kept,
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "0", "--seeds", "1"], "argument --seed: not allowed with argument --seeds"),
        (["--seeds", "1", "2", "1"], "--seeds 1 2 1: name every seed once"),
        (["--seeds", "-1"], "-1 is out of range"),
        (["--seeds"], "expected at least one argument"),
    ],
)
def test_seeds_that_contradict_each_other(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        optimize.main(["--checkpoint", "c", *flags])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_file_in_the_place_of_a_folder(trained, tmp_path, capsys):
    (tmp_path / "seed-1").touch()
    assert run(trained, tmp_path, "--seeds", "0", "1") == 1
    assert capsys.readouterr().err == f"optimize: error: {tmp_path}/seed-1: File exists\n"


def test_memory_is_counted_for_all_seeds(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "free_memory", lambda: 50_000_000)  # enough for the network alone
    assert run(trained, tmp_path, "--seeds", "0", "1", "2") == 1
    assert "this network with batches of 96 images needs about" in capsys.readouterr().err


def test_useless_masks_of_one_seed_are_named():
    subject = Subject(None, None, True, ImageSet(torch.zeros(100, 1), torch.zeros(100, dtype=torch.int64), 10), {})
    good, bad = {"defender acc %": 90.0}, {"defender acc %": 11.0}
    optimize.refuse_useless([{"by seed": {"4": good, "7": good}}] * 2, subject)
    with pytest.raises(InputError, match=r"^seed 7: with these masks the network only guesses \(11.0 %"):
        optimize.refuse_useless([{"by seed": {"4": good, "7": good}}, {"by seed": {"4": good, "7": bad}}], subject)
    with pytest.raises(InputError, match=r"^with these masks the network only guesses"):
        optimize.refuse_useless([good, bad], subject)
