"""The detector: statistics of planted networks, their test, and the script."""

import json
import math
from statistics import fmean, stdev

import pytest
import torch
from scipy import stats
from torch import nn

import detect_cifar
from data.datasets import Normalization
from defenses.all_to_all import BENIGN_COUNT, BENIGN_DEVIATION, BENIGN_MEAN, Assignment
from defenses.defense import CleanImages
from defenses.detection import (
    Detection,
    DetectionConfig,
    Statistic,
    _climb,
    confusion,
    detect,
    margins,
    tails,
    targeted_noise,
)
from tests.test_structure import ROOT
from utils.errors import InputError

PLAIN = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
REFERENCE = (*(f"benign-{seed}" for seed in (0, 1, 2, "s100", "s104", "s106", "s108", "s110")), "vgg-benign-s121")
QUICK = DetectionConfig(margin_images=3, margin_steps=8, noise_images=20)


class Planted(nn.Module):
    """Each class looks at rows of its own, all alike but ``target``: it has a margin and a neuron that others lack."""

    def __init__(self, classes=6, target=3, neuron=0.0, margin=1.0):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(classes + 1), nn.Linear(classes + 1, classes)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(classes, classes + 1))
            self.linear.weight[target, target] *= margin
            self.linear.weight[target, classes] = neuron
            self.linear.bias.zero_()
            self.norm.bias.fill_(1.0)

    def forward(self, x):
        rows = x.mean((1, 3))  # (B, H)
        features = torch.cat([rows[:, : self.linear.out_features], rows.mean(1, keepdim=True)], 1)
        return self.linear(self.norm(features).relu())


@pytest.fixture
def clean():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(60, 3, 8, 8, generator=generator)
    return CleanImages(images, torch.arange(60) % 6)


def values(network, clean=None, config=QUICK, classes=6):
    found = detect(network, classes, (8, 8), PLAIN, clean, config)
    return {name: torch.tensor(statistic.values) for name, statistic in found.statistics.items()}


@pytest.mark.parametrize("target", [0, 3])
def test_a_class_with_an_inflated_margin_is_suspected(target):
    found = detect(Planted(target=target, margin=40.0), 6, (8, 8), PLAIN, None, QUICK)
    assert found.backdoored and found.suspect == target and found.p_value < 1e-3
    assert list(found.statistics) == ["margin"]
    assert detect(Planted(margin=1.0), 6, (8, 8), PLAIN, None, QUICK).p_value > 0.05


def test_a_neuron_that_sends_everything_to_a_class(clean):
    config = DetectionConfig(noise_eps=0.5, noise_images=20)
    shares = targeted_noise(Planted(target=4, neuron=6.0).eval(), clean, 6, config)
    others = targeted_noise(Planted(target=4, neuron=0.0).eval(), clean, 6, config)
    assert shares.argmax() == 4 and shares[4] == 1 and others[4] < 1
    assert ((shares >= 0) & (shares <= 1)).all()


def test_images_of_the_class_itself_do_not_count():
    """A network that is always right, with hardly any noise: no image of another class gets there."""
    labels = torch.arange(60) % 6
    images = torch.zeros(60, 3, 8, 8)
    images[torch.arange(60), :, labels] = 1.0
    clean = CleanImages(images, labels)
    assert clean.accuracy(Planted()) == 1
    shares = targeted_noise(Planted().eval(), clean, 6, DetectionConfig(noise_eps=1e-6, noise_images=20))
    assert shares.tolist() == [0.0] * 6


def test_a_noise_is_that_of_its_class_alone(clean, monkeypatch):
    """Classes share passes; one by one they come to the same."""
    network = Planted().eval()
    together = targeted_noise(network, clean, 6, QUICK)
    margin = margins(network, 6, (8, 8), PLAIN, QUICK)
    monkeypatch.setattr("defenses.detection.TOGETHER", 1)
    torch.testing.assert_close(targeted_noise(network, clean, 6, QUICK), together, atol=0.051, rtol=0)  # one image
    torch.testing.assert_close(margins(network, 6, (8, 8), PLAIN, QUICK), margin, atol=1e-4, rtol=1e-4)


def test_other_names_for_the_classes_change_nothing_else(clean):
    network, order = Planted(neuron=2.0, margin=3.0), torch.tensor([4, 2, 0, 5, 1, 3])
    before = values(network, clean)
    with torch.no_grad():  # class i is now order[i]
        network.linear.weight.copy_(network.linear.weight[order.argsort()])
    renamed = CleanImages(clean.images, order[clean.labels])
    after = values(network, renamed)
    for name in before:
        torch.testing.assert_close(after[name][order], before[name], atol=0.051 if name == "noise" else 1e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_network_alone(network):
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.conv1.weight.requires_grad_(False)
    network.layer2.eval()
    images = torch.rand(30, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    clean = CleanImages(images, torch.arange(30) % 10)
    config = DetectionConfig(margin_images=2, margin_steps=2, noise_images=5)
    first, again = (detect(network, 10, (32, 32), PLAIN, clean, config).as_dict() for _ in range(2))
    assert first == again
    other = detect(network, 10, (32, 32), PLAIN, clean, DetectionConfig(margin_images=2, margin_steps=2, seed=1))
    assert other.statistics["margin"].values != first["statistics"]["margin"]["values"]
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
    assert network.training and network.layer3.training and not network.layer2.training
    assert not network.conv1.weight.requires_grad and network.linear.weight.requires_grad


def test_more_ascent_finds_larger_margins():
    few, many = (
        margins(Planted().eval(), 6, (8, 8), PLAIN, DetectionConfig(margin_images=3, margin_steps=steps))
        for steps in (1, 40)
    )
    assert (many >= few).all() and many.sum() > 1.2 * few.sum()


def test_the_best_of_the_images_counts():
    """The first of five images is the only one of one: more images find no smaller margins, and some larger ones."""
    few, many = (
        margins(Planted().eval(), 6, (8, 8), PLAIN, DetectionConfig(margin_images=count, margin_steps=3))
        for count in (1, 5)
    )
    assert (many >= few - 1e-5).all() and (many > few + 1e-3).any()


def test_the_p_value_is_that_of_a_gamma_distribution():
    statistic = Statistic.of(torch.tensor([2.0, 3.0, 9.0, 4.0, 3.5]))
    others = torch.tensor([2.0, 3.0, 4.0, 3.5], dtype=torch.float64)
    shape, scale = float(others.mean() ** 2 / others.var()), float(others.var() / others.mean())
    assert statistic.suspect == 2
    assert statistic.p_value == pytest.approx(1 - stats.gamma.cdf(9.0, shape, scale=scale) ** 5)


@pytest.mark.parametrize(("numbers", "p_value"), [([1.0, 1, 1, 1], 1.0), ([1.0, 1, 2, 1], 0.0), ([0.0, 0, 0, 0], 1.0)])
def test_classes_that_are_all_alike(numbers, p_value):
    assert Statistic.of(torch.tensor(numbers)).p_value == p_value


ORDINARY, HIGH = [2.0, 3.0, 4.0, 3.5, 2.5], [2.0, 9.0, 4.0, 3.5, 2.5]


def found_in(*values, assignment=None, level=0.05):
    statistics = {str(number): Statistic.of(torch.tensor(each)) for number, each in enumerate(values)}
    return Detection.of(statistics, level, assignment)


def test_values_that_differ_by_rounding_alone_are_alike():
    assert tails(torch.full((10,), 0.1, dtype=torch.float64)).tolist() == [1.0] * 10


def test_statistics_are_combined_class_by_class():
    """By Fisher's method, for the best of five classes; two that point to the same class say more than one."""
    both = tails(torch.tensor([HIGH, ORDINARY])[0])[1], tails(torch.tensor(ORDINARY))[1]
    fisher = stats.combine_pvalues([float(each) for each in both], method="fisher").pvalue
    found = found_in(HIGH, ORDINARY)
    assert found.suspect == 1 and found.p_value == pytest.approx(1 - (1 - fisher) ** 5)
    elsewhere = [ORDINARY[0], *HIGH[2:], HIGH[1]]
    assert found_in(HIGH, HIGH).p_value < found_in(HIGH).p_value < found_in(HIGH, elsewhere).p_value


def test_one_statistic_is_left_as_it_is():
    alone = Statistic.of(torch.tensor(HIGH))
    found = found_in(HIGH)
    assert found.suspect == 1 and found.p_value == pytest.approx(alone.p_value)
    assert found.backdoored and not found_in(HIGH, level=0.9 * alone.p_value).backdoored


def test_statistics_that_are_certain():
    """Of two classes far out the one further out is suspected, however small the p-values."""
    far = [*HIGH[:4], 9.1]
    assert found_in(far, far).suspect == 4
    alike = found_in([1.0, 1.0, 2.0, 1.0, 1.0], [1.0] * 5)
    assert (alike.suspect, alike.backdoored) == (2, True) and alike.p_value < 1e-200
    assert found_in([1.0] * 5, [0.0] * 5).p_value == 1


def test_the_assignment_has_a_tenth_of_the_level():
    low, high = (Assignment([1, 0], [0.1, 0.1], 0.05, p_value) for p_value in (0.004, 0.04))
    found = found_in(ORDINARY, ORDINARY, assignment=low)
    assert found.backdoored and found.suspect is None and found.p_value == pytest.approx(0.04)
    found = found_in(HIGH, HIGH, assignment=high)
    assert found.suspect == 1 and found.p_value == pytest.approx(found_in(HIGH, HIGH).p_value / 0.9)
    assert not found_in(ORDINARY, ORDINARY, assignment=high).backdoored
    assert found.as_dict()["assignment"] == {"targets": [1, 0], "flows": [0.1, 0.1], "ahead": 0.05, "p_value": 0.04}


def mixed(classes=8, strength=0.0, order=None, seed=0):
    """Return a confusion: classes that look alike, two that attract others, and an assignment of some strength."""
    generator = torch.Generator().manual_seed(seed)
    alike = torch.rand(classes, classes, generator=generator) * 0.05
    found = alike + alike.T + 0.002 * torch.rand(classes, classes, generator=generator)
    for first in range(0, classes, 2):  # two by two
        found[first, first + 1] += 0.3
        found[first + 1, first] += 0.3
    found[:, 2:4] += 0.1
    found[torch.arange(classes), torch.arange(1, classes + 1) % classes if order is None else order] += strength
    return found


def test_an_assignment_is_found_among_classes_that_look_alike_and_attract():
    order = torch.tensor([3, 0, 5, 6, 7, 1, 4, 2])
    found = Assignment.of(mixed(strength=0.08, order=order))
    assert found.targets == order.tolist() and found.p_value < 1e-4
    assert found.ahead == pytest.approx(0.08, abs=0.01)
    without = Assignment.of(mixed())
    assert without.p_value > 0.5 and without.ahead < 0.005


def test_the_next_assignment_has_no_pair_of_the_best():
    """Worked out by hand: flows 0.3 along 0 > 1 > 2 > 3 > 0; without these pairs only 0 - 2 and 1 - 3 are left."""
    found = torch.zeros(4, 4)
    found[torch.arange(4), torch.tensor([1, 2, 3, 0])] = 0.3
    found[0, 2], found[1, 3] = 0.1, 0.04  # and -0.1, -0.04 back: they cancel in an assignment of both ways
    assert Assignment.of(found).ahead == pytest.approx(0.3 - 0.0)
    found[0, 1] = 0.5  # a mean of 0.35
    assert Assignment.of(found).flows == pytest.approx([0.5, 0.3, 0.3, 0.3])


def test_no_class_is_assigned_to_itself():
    """Three classes turn into each other; the fourth has to go somewhere, and breaks that."""
    found = torch.zeros(4, 4)
    found[torch.arange(3), torch.tensor([1, 2, 0])] = 0.3
    assert sorted(Assignment.of(found).flows) == pytest.approx([0.0, 0.0, 0.3, 0.3])


def test_classes_that_attract_others_cancel():
    few, many = mixed(strength=0.05), mixed(strength=0.05)
    many[:, 5] += 0.2
    many[5, :] -= 0.2
    assert Assignment.of(many).ahead == pytest.approx(Assignment.of(few).ahead, abs=1e-6)


def test_the_reference_is_that_of_the_benign_networks():
    """Student's t of one more of them, as SciPy has it."""
    found = Assignment.of(mixed(strength=0.03))
    deviation = BENIGN_DEVIATION * math.sqrt(1 + 1 / BENIGN_COUNT)
    expected = stats.t.sf(found.ahead, BENIGN_COUNT - 1, BENIGN_MEAN, deviation)
    assert found.p_value == pytest.approx(expected, rel=1e-6)
    files = [ROOT / "results" / "detection" / f"{name}.json" for name in REFERENCE]
    values = [json.loads(file.read_text())["assignment"]["ahead"] for file in files]
    assert len(values) == BENIGN_COUNT
    assert pytest.approx(fmean(values), abs=1e-5) == BENIGN_MEAN
    assert pytest.approx(stdev(values), abs=1e-5) == BENIGN_DEVIATION


class Turning(nn.Module):
    """Right about images, but the last of its neurons turn each class into the next one; noise makes them louder."""

    def __init__(self, classes=10, strength=0.0):
        super().__init__()
        self.norm, self.classes = nn.BatchNorm1d(2 * classes), classes
        self.linear = nn.Linear(2 * classes, classes, bias=False)
        with torch.no_grad():
            turned = strength * torch.eye(classes).roll(1, 0)  # class s feeds the logit of s + 1
            self.linear.weight.copy_(torch.cat([2 * torch.eye(classes), turned], 1))

    def forward(self, x):
        rows = x.mean((1, 3))[:, : self.classes]
        return self.linear(self.norm(torch.cat([rows, rows], 1)))


def of_rows(each=30, classes=10):
    """Return images whose class is their brightest row, sorted by class."""
    generator = torch.Generator().manual_seed(3)
    count, labels = each * classes, torch.arange(classes).repeat_interleave(each)
    images = torch.rand(count, 3, 12, 12, generator=generator) * 0.5
    images[torch.arange(count), :, labels] += 0.6
    return CleanImages(images, labels)


def turned(strength, clean):
    return detect(Turning(clean.labels.max() + 1, strength), int(clean.labels.max()) + 1, (12, 12), PLAIN, clean, QUICK)


def test_a_network_that_turns_each_class_into_the_next_one():
    found = turned(1.5, of_rows())
    assert found.backdoored and found.suspect is None
    assert found.assignment.targets == [*range(1, 10), 0] and min(found.assignment.flows) > 0.02
    straight = turned(0.0, of_rows())
    assert straight.assignment.p_value > 0.5 and straight.suspect is not None


def test_a_confusion_is_a_mean_over_the_images_of_a_class(monkeypatch):
    network, clean = Turning(strength=1.0).eval(), of_rows(6)
    found = confusion(network, clean, 10)
    torch.testing.assert_close(found.sum(1), torch.ones(10))
    monkeypatch.setattr("defenses.detection.EPS", 1e-7)
    still = confusion(network, clean, 10)
    network.norm.training = True
    with torch.no_grad():
        known = network(clean.images).softmax(1)
    expected = torch.stack([known[clean.labels == label].mean(0) for label in range(10)])
    torch.testing.assert_close(still, expected, atol=1e-5, rtol=1e-4)
    assert found.diagonal().mean() < still.diagonal().mean() - 1e-3, "the noise climbs the cross entropy"
    rest = CleanImages(clean.images[clean.labels != 4], clean.labels[clean.labels != 4])
    assert confusion(network, rest, 10)[4].tolist() == [0.0] * 10


def test_images_that_take_several_batches(monkeypatch):
    """Whatever their order, each batch has images of all classes: its statistics are theirs."""
    network, clean, seen = Turning(strength=1.0).eval(), of_rows(), []
    together = confusion(network, clean, 10)
    monkeypatch.setattr("defenses.detection.TOGETHER", 15)  # 144 pixels an image: 106 images
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: (seen.append(len(x)), x @ layer.weight.T)[1])
    torch.testing.assert_close(confusion(network, clean, 10), together, atol=0.01, rtol=0)
    assert set(seen) == {100}


def test_noise_climbs_the_sum_over_several_batches():
    """Their slopes disagree: the first batch's is twice the last one's, which has the other sign."""
    moved, still = _climb(lambda noise: (way * noise[0].sum() for way in (2, -1)), torch.zeros(2), steps=3, eps=0.1)
    assert moved.tolist() == pytest.approx([0.1, 0.1])
    assert still.tolist() == [0, 0]


def test_classes_and_images_without_a_reference_have_no_assignment():
    assert turned(1.5, of_rows(25)).assignment is not None
    assert turned(1.5, of_rows(30, classes=9)).assignment is None
    few = of_rows(40)
    kept = (few.labels != 4) | (torch.arange(400) % 40 < 24)
    assert turned(1.5, CleanImages(few.images[kept], few.labels[kept])).assignment is None


@pytest.mark.parametrize("wrong", [torch.zeros(3, 3), torch.zeros(5, 4), torch.full((5, 5), torch.nan)])
def test_what_is_no_confusion(wrong):
    with pytest.raises(ValueError, match="expected finite values"):
        Assignment.of(wrong)


def test_few_classes_are_one_line_and_many_work(clean):
    with pytest.raises(InputError, match="2 classes: among fewer than 4 none can stand out"):
        detect(Planted(2, 0), 2, (8, 8), PLAIN, None, QUICK)
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 200))
    found = values(
        network,
        CleanImages(images, torch.arange(40) * 5),
        DetectionConfig(margin_images=2, margin_steps=2, noise_images=2),
        200,
    )
    assert len(found["margin"]) == len(found["noise"]) == 200


@pytest.mark.parametrize("parameter", ["linear.weight", "norm.bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_network_that_answers_nan_is_refused(parameter, value, clean):
    network = Planted()
    with torch.no_grad():
        network.get_parameter(parameter).view(-1)[0] = value
    for images in (None, clean):
        with pytest.raises(InputError, match="the network answers NaN or infinite values; is it trained"):
            detect(network, 6, (8, 8), PLAIN, images, QUICK)
    with pytest.raises(InputError, match="the network answers NaN"):
        targeted_noise(network.eval(), clean, 6, QUICK)


@pytest.mark.parametrize("classes", [5, 7])
def test_another_number_of_classes_than_the_network_has(classes, clean):
    with pytest.raises(InputError, match=rf"the network's output is \(\d+, 6\), expected \(\d+, {classes}\)"):
        margins(Planted().eval(), classes, (8, 8), PLAIN, DetectionConfig(margin_images=3, margin_steps=1))
    with pytest.raises(InputError, match=rf"expected \(\d+, {classes}\)"):
        targeted_noise(Planted().eval(), CleanImages(clean.images, clean.labels % 5), classes, QUICK)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_whatever_gradient_mode_the_caller_is_in(mode, clean):
    network, expected = Planted(neuron=2.0), detect(Planted(neuron=2.0), 6, (8, 8), PLAIN, clean, QUICK)
    with mode():
        assert detect(network, 6, (8, 8), PLAIN, clean, QUICK) == expected


def test_clean_images_of_one_class_alone():
    images = CleanImages(torch.rand(5, 3, 8, 8), torch.zeros(5).long())
    with pytest.raises(InputError, match="5 clean images, all but 0 of one class"):
        targeted_noise(Planted().eval(), images, 6, QUICK)


def test_labels_beyond_the_classes(clean):
    with pytest.raises(InputError, match="labels go up to 8, but the network's classes are 0 to 5"):
        detect(Planted(), 6, (8, 8), PLAIN, CleanImages(clean.images, clean.labels + 3), QUICK)


def test_a_network_without_batchnorm(clean):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))
    found = values(network, clean)
    assert len(found["noise"]) == 6 and ((found["noise"] >= 0) & (found["noise"] <= 1)).all()


# ---- the script


def command(trained, into, *flags):
    given = ["--checkpoint", f"{trained}/last_model.th", "--output-dir", str(into), "--precision", "fp32"]
    quick = ["--margin-images", "2", "--margin-steps", "2", "--noise-images", "10", "--val-frac", "0.1"]
    return [*given, *quick, *map(str, flags)]


def test_the_script_writes_what_it_found(trained, tmp_path, capsys):
    assert detect_cifar.main(command(trained, tmp_path)) == 0
    printed = capsys.readouterr().out
    names = {"detection.json", "detection.png", "detection.pdf", "detect_log.jsonl", ".lock"}
    assert {path.name for path in tmp_path.iterdir()} == names
    found = json.loads((tmp_path / "detection.json").read_text())
    assert len(found["statistics"]["margin"]["values"]) == len(found["statistics"]["noise"]["values"]) == 10
    verdict = "backdoored: class" if found["backdoored"] else "no backdoor found: class"
    assert f"{verdict} {found['suspect']} ({found['suspect_name']})" in printed and "trigger" not in printed
    assert found["noise_images"] == 10 and "a noise saw" not in printed
    assert found["assignment"] is None
    assert "no assignment: it is known for 10 classes with 25 clean images each, or more of them" in printed
    assert detect_cifar.main(command(trained, tmp_path)) == 1
    assert "detection.json is there already" in capsys.readouterr().err
    before = (tmp_path / "detection.png").read_bytes()
    assert detect_cifar.main(command(trained, tmp_path, "--overwrite")) == 0
    again = json.loads((tmp_path / "detection.json").read_text())
    assert again["statistics"] == found["statistics"] and (tmp_path / "detection.png").read_bytes() == before


def test_fewer_images_than_asked_for_are_said(trained, tmp_path, capsys):
    assert detect_cifar.main(command(trained, tmp_path, "--noise-images", "500")) == 0
    found = json.loads((tmp_path / "detection.json").read_text())
    assert 30 < found["noise_images"] < found["clean_images"] == 60
    line = f"a noise saw {found['noise_images']} images, not 500: there are no more of other classes"
    assert line in capsys.readouterr().out.splitlines()


def test_a_trigger_cannot_be_given(trained, tmp_path, capsys):
    for flag in ("--trigger-info", "--triggered-images"):
        with pytest.raises(SystemExit):
            detect_cifar.main(command(trained, tmp_path, flag, f"{trained}/trigger_info.th"))
        assert f"unrecognized arguments: {flag}" in capsys.readouterr().err
