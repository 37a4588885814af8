"""Patches, and where pruning stops without the trigger: planted networks whose answer is known, and the script."""

import json

import pytest
import torch
from torch import nn

import prune_neuron_cifar as prune
from data.datasets import Normalization
from defenses.defense import CleanImages
from defenses.detection import Detection
from defenses.patches import PatchConfig, Patches, learn_patches, logits_of_pixels, pixels_of
from defenses.pruning import ChoiceConfig, choose
from defenses.trigger_free import (
    Row,
    Stop,
    TriggerFree,
    TriggerFreeConfig,
    choose_trigger_free,
    grid,
    search,
    stop_of,
    within,
)
from models.neurons import Neuron
from utils.errors import InputError

PLAIN = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
SCALED = Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
CLASSES, SIZE, TARGET = 6, 8, 3
CORNER = 1 / 16  # share of the image: 4 of its 64 pixels


class Backdoored(nn.Module):
    """Tells images by the brightest of their upper rows; a bright lower corner means the target whatever they show."""

    def __init__(self, target=TARGET, force=50.0):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(CLASSES + 2), nn.Linear(CLASSES + 2, CLASSES, bias=False)
        with torch.no_grad():
            self.linear.weight.zero_()
            self.linear.weight[:, :CLASSES] = 10 * torch.eye(CLASSES)
            self.linear.weight[target, CLASSES] = force
            self.norm.running_mean[CLASSES] = 0.6  # of the corner; darker ones say nothing
            self.norm.running_mean[CLASSES + 1] = 2.0  # a neuron without a task

    def forward(self, x):
        corner = x[:, :, -2:, -2:].mean((1, 2, 3))
        features = torch.cat([x.mean(1).mean(2)[:, :CLASSES], corner[:, None], corner[:, None]], 1)
        return self.linear(nn.functional.leaky_relu(self.norm(features), 0.1))


def clean_images(count=120, seed=0):
    """Images whose row of their class is bright, as networks take them: (N, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    images = 0.5 * torch.rand(count, 3, SIZE, SIZE, generator=generator)
    images[torch.arange(count), :, labels] += 0.4
    return CleanImages(images, labels)


def in_order(order, papers=1):
    """The neurons with these indices, sorted by mask; so many masks are within the paper's threshold."""
    return [Neuron("norm", index, 0.2 + 0.1 * (place - papers + 1)) for place, index in enumerate(order)]


def neurons_of(papers=1):
    """All neurons, that of the corner first, then the one without a task, then the classes'."""
    return in_order([CLASSES, CLASSES + 1, *range(CLASSES)], papers)


QUICK = {"patch_share": CORNER, "patch_steps": 300}


def patches_of(network, config=None, targets=(1, TARGET), avoid=None):
    clean = clean_images()
    pixels = pixels_of(clean, PLAIN)
    one, other = (each and logits_of_pixels(each.eval(), PLAIN, torch.float32) for each in (network, avoid))
    found = learn_patches(one, pixels, clean.labels, torch.tensor(targets), config or PatchConfig(**QUICK), other)
    return found, found.reached(one, pixels, clean.labels)


# ---- patches


def test_a_patch_finds_the_trigger_and_nothing_like_it_elsewhere():
    found, reached = patches_of(Backdoored())
    assert reached[1] > 0.95 and reached[0] < 0.5
    assert (found.masks.sum((1, 2, 3)) <= CORNER * SIZE * SIZE + 1e-4).all()
    for values in (found.masks, found.patterns):
        assert values.min() >= 0 and values.max() <= 1
    inside = found.masks[1, -2:, -2:].sum() / found.masks[1].sum()
    assert inside > 0.8


def test_a_patch_can_be_asked_to_fail_on_another_network():
    """Where both networks have the corner there is nothing left for it; where one lacks it, it stays."""
    _, same = patches_of(Backdoored(), targets=(TARGET,), avoid=Backdoored())
    _, other = patches_of(Backdoored(), targets=(TARGET,), avoid=Backdoored(force=0.0))
    assert other > 0.95 and same < 0.5


def test_a_patch_is_not_as_large_as_it_likes():
    """After few steps, too, before its price has risen."""
    found, _ = patches_of(Backdoored(), PatchConfig(patch_share=1 / 64, patch_steps=3))
    assert (found.masks.sum((1, 2, 3)) <= 1 + 1e-4).all()


def test_images_of_the_class_itself_are_not_moved_there():
    """A patch that is not there moves none, though a sixth of the images are of the class already."""
    clean, network = clean_images(), Backdoored(force=0.0).eval()
    nothing = Patches(torch.tensor([TARGET]), torch.zeros(1, SIZE, SIZE, 1), torch.zeros(1, SIZE, SIZE, 3))
    assert nothing.reached(logits_of_pixels(network, PLAIN, torch.float32), pixels_of(clean, PLAIN), clean.labels) == 0


def test_patches_are_those_of_their_classes_alone():
    shares = {target: patches_of(Backdoored(target=target), targets=(1, target))[1][1] for target in (0, 2, 5)}
    assert min(shares.values()) > 0.95


def test_the_same_seed_makes_the_same_patches():
    (first, _), (second, _), (third, _) = (
        patches_of(Backdoored(), PatchConfig(**QUICK, patch_seed=s)) for s in (0, 0, 1)
    )
    assert torch.equal(first.masks, second.masks) and torch.equal(first.patterns, second.patterns)
    assert not torch.equal(first.masks, third.masks)


def test_pixels_are_those_that_were_normalised():
    clean = clean_images()
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (SCALED.mean, SCALED.std))
    scaled = CleanImages((clean.images - mean) / std, clean.labels)
    assert torch.allclose(pixels_of(scaled, SCALED), clean.images.permute(0, 2, 3, 1), atol=1e-6)


def test_images_of_one_class_teach_no_patch():
    clean = clean_images()
    logits = logits_of_pixels(Backdoored().eval(), PLAIN, torch.float32)
    labels = torch.full_like(clean.labels, 2)
    with pytest.raises(InputError, match="all clean images are of one class"):
        learn_patches(logits, pixels_of(clean, PLAIN), labels, torch.tensor([2]), PatchConfig(**QUICK))


# ---- the search


def test_the_grid_is_geometric_and_rises():
    counts = list(grid(1200))
    assert counts[:4] == [0, 6, 7, 9] and counts == sorted(set(counts)) and 500 < counts[-1] <= 600
    for neurons in (1, 2, 8, 50):
        assert max(grid(neurons)) <= neurons / 2 and list(grid(neurons)) == sorted(set(grid(neurons)))


def test_pruning_stops_at_the_first_point_where_the_patch_fails():
    assert search(lambda count: 0.9 if count < 15 else 0.05, [0, 10, 20, 30], 0.1) == (20, False)


def test_a_patch_that_fails_once_has_not_failed():
    counts = [0, 10, 20, 30, 40]
    reached = dict(zip(counts, [0.9, 0.05, 0.8, 0.1, 0.0], strict=True))
    assert search(lambda count: reached.get(count, 1.0), counts, 0.1) == (30, False)


def test_a_patch_that_fails_at_the_last_point_has_failed():
    assert search(lambda count: 0.9 if count < 20 else 0.05, [0, 10, 20], 0.1) == (20, False)


def test_a_patch_that_never_fails_ends_at_the_cap():
    assert search(lambda count: 0.5, [0, 10, 20], 0.1) == (20, True)


def test_the_grid_ends_before_the_cap():
    assert within(lambda count: 0.9 - count / 1000, [0, 50, 99, 101, 102], 0.1) == [0, 50, 99]
    recovers = {0: 0.9, 1: 0.1, 2: 0.9}
    assert within(recovers.__getitem__, [0, 1, 2], 0.1) == [0]


# ---- the rule


def rule(network, neurons, **settings):
    config = TriggerFreeConfig(**QUICK, **settings)
    return stop_of(network, neurons, TARGET, clean_images(), clean_images(seed=1), PLAIN, config)


def test_pruning_stops_when_the_trigger_is_gone():
    stop = rule(Backdoored(), neurons_of())
    assert (stop.count, stop.abstained) == (1, False) and stop.learnt > 0.95
    rows = {row.count: row for row in stop.rows}
    assert rows[0].reached == stop.learnt and rows[1].reached < 0.16
    assert rows[0].accuracy == rows[1].accuracy == 1


def test_pruning_goes_at_least_to_the_papers_threshold_within_the_cap():
    """Though the patch has failed before, and where no point of the grid is there; the third neuron is a class's."""
    stop = rule(Backdoored(), neurons_of(papers=3), accuracy_cap=40.0)
    assert (stop.count, stop.abstained, stop.rows[-1].count) == (3, False, 4)
    assert rule(Backdoored(), neurons_of(papers=3), accuracy_cap=5.0).count == 2
    assert 5 not in grid(CLASSES + 2) and rule(Backdoored(), neurons_of(papers=5), accuracy_cap=100.0).count == 5


def test_a_backdoor_behind_the_accuracy_cap_is_said_to_be_there():
    """The neuron of the corner comes after that of a class, which costs a sixth of the accuracy."""
    neurons = in_order([CLASSES + 1, 0, CLASSES, *range(1, CLASSES)], papers=3)
    stop = rule(Backdoored(), neurons, accuracy_cap=5.0)
    assert (stop.count, stop.abstained) == (None, True) and stop.learnt < 0.5
    assert not rule(Backdoored(), neurons, accuracy_cap=30.0).abstained
    found = TriggerFree(Detection({}, True, TARGET, 0.01), stop, TriggerFreeConfig())
    assert found.choice(neurons).point.count == 1  # three masks are up to 0.2, but the cap comes first
    assert "abstained: no patch for class 3 that pruning stops" in found.choice(neurons).reason


def test_what_it_would_cost_to_go_beyond_the_cap(monkeypatch):
    """A patch that uses the corner, whatever the network at the cap says; its neuron comes after two classes'."""
    from defenses import trigger_free as module

    learn = module.learn_patches
    monkeypatch.setattr(module, "learn_patches", lambda *given: learn(*given[:-1]))
    neurons = in_order([CLASSES + 1, 0, 1, CLASSES, *range(2, CLASSES)])
    stop = rule(Backdoored(), neurons, accuracy_cap=5.0)
    assert (stop.count, stop.abstained, stop.beyond.count) == (1, True, 4) and stop.rows[-1].count == 1
    assert stop.beyond.reached <= 0.16 and stop.beyond.accuracy == pytest.approx(4 / 6, abs=0.02)
    found = TriggerFree(Detection({}, True, TARGET, 0.01), stop, TriggerFreeConfig()).choice(neurons)
    assert found.point.count == 1 and found.reason.startswith(
        "abstained at the accuracy cap: the patch for class 3 moves"
    )
    accuracy = f"{100 * stop.beyond.accuracy:.1f} % on the defender's images"
    assert found.reason.endswith(f"; it fails where 4 neurons are pruned, at an accuracy of {accuracy}")
    last = in_order([CLASSES + 1, 0, 1, *range(2, CLASSES), CLASSES])  # the grid ends at half of the neurons
    stop = rule(Backdoored(), last, accuracy_cap=5.0)
    found = TriggerFree(Detection({}, True, TARGET, 0.01), stop, TriggerFreeConfig()).choice(last)
    assert stop.beyond is None and found.reason.endswith("; it works wherever the search went")


def test_the_cap_ends_the_search_at_the_last_point_of_the_grid():
    """The paper's threshold is beyond it, and beyond the cap: it is the cap that is named."""
    stop = Stop(4, True, 1.0, [Row(4, 0.9, 0.9)], Row(6, 0.0, 0.5))
    found = TriggerFree(Detection({}, True, TARGET, 0.01), stop, TriggerFreeConfig())
    assert found.choice(neurons_of(papers=6)).reason.startswith("abstained at the accuracy cap: ")
    assert found.choice(neurons_of(papers=1)).reason.startswith("abstained where the search ends: ")


def test_the_strongest_patch_counts(monkeypatch):
    """Some starts find nothing."""
    from defenses import trigger_free as module

    learn = module.learn_patches

    def one_finds_nothing(*given):
        patches = learn(*given)
        return Patches(patches.targets, patches.masks * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1), patches.patterns)

    monkeypatch.setattr(module, "learn_patches", one_finds_nothing)
    stop = rule(Backdoored(), neurons_of())
    assert stop.learnt > 0.95 and (stop.count, stop.abstained) == (1, False)


@pytest.fixture
def verdict(monkeypatch):
    """Let the detector say this."""
    from defenses import trigger_free as module

    return lambda backdoored, suspect=TARGET: monkeypatch.setattr(
        module, "detect", lambda *given: Detection({}, backdoored, suspect, 0.01 if backdoored else 0.5)
    )


def test_nothing_is_pruned_where_no_backdoor_was_found(verdict):
    verdict(False)
    found = choose_trigger_free(Backdoored(), neurons_of(), CLASSES, PLAIN, clean_images())
    choice = found.choice(neurons_of())
    assert found.stop is None and choice.point.count == 0
    assert choice.words == "prune nothing" and choice.reason == "no backdoor was found, p = 0.5"


def test_where_each_class_goes_to_another_it_is_the_papers_threshold_within_the_cap(verdict, monkeypatch):
    verdict(True, None)
    monkeypatch.setattr("defenses.trigger_free.learn_patches", None)  # there is no class to learn one for
    config = TriggerFreeConfig(**QUICK, accuracy_cap=100.0)
    found = choose_trigger_free(Backdoored(), neurons_of(), CLASSES, PLAIN, clean_images(), None, config)
    choice = found.choice(neurons_of())
    assert choice.point.count == min(found.stop.rows[-1].count, 1)
    assert choice.reason.startswith(
        "abstained: classes go each to another, so no patch stands in for the trigger; the "
    )
    assert {row.reached for row in found.stop.rows} == {None} and found.stop.rows[0].accuracy == 1


def test_the_choice_in_words(verdict):
    verdict(True)
    network = Backdoored()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    config = TriggerFreeConfig(**QUICK)
    found = choose_trigger_free(network, neurons_of(), CLASSES, PLAIN, clean_images(), None, config)
    choice = found.choice(neurons_of())
    assert choice.point.count == 1 and choice.words == "prune the 1 neurons of smallest mask, up to 0.2"
    assert choice.reason.startswith(
        "the paper's threshold; the patch for class 3 moves 0 % of other classes' images there, "
    )
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert json.loads(json.dumps(found.as_dict()))["stop"]["count"] == 1


# ---- the script


def step_3(folder, output, *flags):
    source = ["--checkpoint", f"{folder}/last_model.th", "--mask-file", f"{folder}/mask_values.txt"]
    quick = ["--pruning-max", "0.2", "--precision", "fp32", "--val-frac", "0.1"]
    patches = ["--patch-steps", "2"] if "--trigger-free" in flags else []
    return prune.main([*source, *quick, *patches, "--output-dir", str(output), *flags])


def test_step_3_writes_down_what_it_found(trained, tmp_path, capsys):
    """The same without a trigger as with it: nothing but the report depends on it."""
    with_trigger = ["--trigger-info", f"{trained}/trigger_info.th"]
    assert step_3(trained, tmp_path / "a", "--trigger-free", *with_trigger) == 0
    assert step_3(trained, tmp_path / "b", "--trigger-free") == 0
    texts = [(tmp_path / name / "trigger_free.json").read_bytes() for name in "ab"]
    assert texts[0] == texts[1]
    found = json.loads(texts[0])
    card = json.loads((tmp_path / "a" / "repaired_model.json").read_text())
    assert card["repair"]["pruned_neurons"] == (found["stop"]["count"] if found["stop"] else 0)
    assert card["repair"]["why"] in capsys.readouterr().out


def test_step_3_draws_where_there_is_a_suspicion(trained, tmp_path, verdict):
    """Again with --overwrite where there is none: the pictures of before are gone."""
    verdict(True)
    assert step_3(trained, tmp_path, "--trigger-free") == 0
    stop = json.loads((tmp_path / "trigger_free.json").read_text())["stop"]
    assert stop["rows"][0]["count"] == 0
    pictures = [tmp_path / f"trigger_free.{suffix}" for suffix in ("png", "pdf")]
    assert all(picture.stat().st_size > 1000 for picture in pictures)
    verdict(True, None)
    assert step_3(trained, tmp_path, "--trigger-free", "--overwrite") == 0
    assert not any(picture.exists() for picture in pictures)
    verdict(False)
    assert step_3(trained, tmp_path, "--trigger-free", "--overwrite") == 0
    assert not any(picture.exists() for picture in pictures)
    card = json.loads((tmp_path / "repaired_model.json").read_text())
    assert card["repair"]["pruned_neurons"] == 0 and card["repair"]["why"] == "no backdoor was found, p = 0.5"


def test_flags_of_the_patches_need_the_rule(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        step_3(trained, tmp_path, "--patches", "3")
    assert "--patches has no effect without --trigger-free; leave it out" in capsys.readouterr().err


def test_accuracies_alone_do_not_choose_it():
    with pytest.raises(ValueError, match="choose_trigger_free"):
        choose(neurons_of(), [], [], ChoiceConfig(trigger_free=True))


def test_grey_images_have_no_patch():
    clean = CleanImages(torch.rand(8, 1, SIZE, SIZE), torch.arange(8) % 2)
    with pytest.raises(InputError, match=r"a patch needs images .N, 3, H, W., got .8, 1, 8, 8."):
        pixels_of(clean, PLAIN)


@torch.inference_mode()
def test_the_callers_mode_plays_no_part():
    assert rule(Backdoored(), neurons_of()).count == 1


@pytest.mark.parametrize("other", [["--threshold", "0.1"], ["--max-acc-drop", "2"], ["--number", "3"]])
def test_one_operating_point(trained, tmp_path, other, capsys):
    with pytest.raises(SystemExit):
        step_3(trained, tmp_path, "--trigger-free", *other)
    assert "not allowed with argument" in capsys.readouterr().err
