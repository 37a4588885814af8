"""How much to prune where nobody knows the trigger: at least until a patch that stands in for it has lost its force.

The detector names a class under suspicion. A patch of bounded size is learnt that sends images to that class in the
untouched network, but not in one pruned as far as its accuracy allows: so it uses what pruning can remove, as the
trigger does, and no natural features of the class. Then the network is pruned up to the paper's threshold, and further
until the patch fails. docs/trigger_free.md says on which networks all that was fixed.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import nn

from data.datasets import Normalization
from defenses.defense import CleanImages
from defenses.detection import Detection, DetectionConfig, detect
from defenses.patches import Logits, PatchConfig, learn_patches, logits_of_pixels, pixels_of
from defenses.pruning import PAPER_THRESHOLD, Choice, choice_of
from formats.subject import Subject
from models.neurons import Neuron, pruned_copy, threshold_point
from utils.config import Range, setting

ALL_TO_ALL = "classes go each to another, so no patch stands in for the trigger"
SAID = "without the trigger: "  # before the name of each part
FIRST, GROWTH, LAST = 0.005, 1.2, 0.5  # of the grid: its first point, the ratio of two, its last; shares of the neurons
LEARNT = 0.5  # share of the images that a patch has to move in the untouched network to stand in for a trigger


@dataclass(frozen=True)
class TriggerFreeConfig(PatchConfig):
    """Settings of the rule.

    Raises:
        ValueError: a setting is out of range.
    """

    patches: int = setting(2, "patches, each from another start; the strongest counts", Range(1, 1000))
    patch_left: float = setting(
        0.16,
        "stop, at the paper's threshold or beyond, where the patches move at most this share of other classes' images",
        Range(0, LEARNT, open_high=True),
    )
    accuracy_cap: float = setting(
        10.0,
        "never lose more than this many percentage points of the defender's accuracy",
        Range(0, 100),
    )


@dataclass(frozen=True)
class Row:
    """The network without some neurons, as a defender sees it.

    Attributes:
        count: of neurons pruned.
        reached: 0..1; share of images of other classes that the patch sends to the suspected class; None without one.
        accuracy: 0..1, on the images by which it judges.
    """

    count: int
    reached: float | None
    accuracy: float


@dataclass(frozen=True)
class Stop:
    """Where to stop.

    Attributes:
        count: of neurons to prune; None where no patch could be learnt, or no single class is under suspicion.
        abstained: no patch was learnt, or it had not failed at the accuracy cap, where the count then is.
        learnt: 0..1; share of the images that the strongest patch moves in the untouched network; None without one.
        rows: all that were looked at up to the cap, by count.
        beyond: where it had not failed at the cap, the first point beyond at which it has; None if there is none.
    """

    count: int | None
    abstained: bool
    learnt: float | None
    rows: list[Row]
    beyond: Row | None = None


@dataclass(frozen=True)
class TriggerFree:
    """What was found without the trigger.

    Attributes:
        detection: whether there is a backdoor, and to which class.
        stop: where to stop pruning; None where no backdoor was found.
        config: the settings.
    """

    detection: Detection
    stop: Stop | None
    config: TriggerFreeConfig

    def choice(self, neurons: list[Neuron]) -> Choice:
        """Return the operating point, in words and why.

        Args:
            neurons: those that were looked at, sorted by mask.

        Raises:
            ValueError: there are fewer.
        """
        if self.stop is None:
            return choice_of(neurons, 0, f"no backdoor was found, p = {self.detection.p_value:.2g}")
        if self.stop.count is None:
            count = min(threshold_point(neurons, PAPER_THRESHOLD).count, self.stop.rows[-1].count)
            suspect = self.detection.suspect
            missing = ALL_TO_ALL if suspect is None else f"no patch for class {suspect} that pruning stops"
            reason = f"abstained: {missing}; the paper's threshold instead, within the accuracy cap"
            return choice_of(neurons, count, reason)
        left = next(row.reached for row in self.stop.rows if row.count == self.stop.count)
        moved = (
            f"the patch for class {self.detection.suspect} moves {100 * left:.0f} % of other classes' images there, "
            f"{100 * self.stop.learnt:.0f} % before"
        )
        if not self.stop.abstained:
            fixed = self.stop.count == threshold_point(neurons, PAPER_THRESHOLD).count
            return choice_of(neurons, self.stop.count, f"the paper's threshold; {moved}" if fixed else moved)
        ended = self.stop.count == points_of(neurons)[-1]
        beyond = "it works wherever the search went"
        if self.stop.beyond:
            accuracy = f"{100 * self.stop.beyond.accuracy:.1f} % on the defender's images"
            beyond = f"it fails where {self.stop.beyond.count} neurons are pruned, at an accuracy of {accuracy}"
        where = "where the search ends" if ended else "at the accuracy cap"
        return choice_of(neurons, self.stop.count, f"abstained {where}: {moved}; {beyond}")

    def curves(self, neurons: int) -> dict[str, list[float]]:
        """Return what the rule looked at, in percent, by what it is; ``neurons`` are there in all."""
        rows = self.stop.rows if self.stop else []
        return {
            "neurons pruned (%)": [100 * row.count / neurons for row in rows],
            f"patches for class {self.detection.suspect}: images moved": [100 * row.reached for row in rows],
            "accuracy of the defender's images": [100 * row.accuracy for row in rows],
        }

    def as_dict(self) -> dict[str, Any]:
        """Return all of it in plain containers."""
        return {
            "detection": self.detection.as_dict(),
            "stop": self.stop and asdict(self.stop),
            "settings": asdict(self.config),
        }


def grid(neurons: int) -> Iterator[int]:
    """Yield 0, then a geometric grid of counts."""
    yield 0
    share, before = FIRST, 0
    while share <= LAST:
        count = round(share * neurons)
        if count > before:
            yield count
            before = count
        share *= GROWTH


def points_of(neurons: list[Neuron]) -> list[int]:
    """Return the counts at which the search looks, rising from 0: the grid, and the paper's threshold."""
    return sorted({*grid(len(neurons)), threshold_point(neurons, PAPER_THRESHOLD).count})


def within(accuracy: Callable[[int], float], points: list[int], cap: float) -> list[int]:
    """Return the points up to the last before accuracy falls by more than the cap.

    Args:
        accuracy: of the network without so many neurons, 0..1.
        points: counts of neurons, rising from 0.
        cap: of the drop, 0..1.
    """
    lowest = accuracy(0) - cap - 1e-9
    return list(takewhile(lambda count: accuracy(count) >= lowest, points))


def search(reached: Callable[[int], float], counts: list[int], left: float) -> tuple[int, bool]:
    """Find the first point at which the patches have failed, there and at the next one, if there is one.

    The point is not refined towards the one before, since patches fail a little before the trigger does.

    Args:
        reached: share of images that the strongest patch moves in the network without so many neurons.
        counts: of neurons, rising.
        left: a patch has failed that moves at most this share.

    Returns:
        The count, and whether it is only the last, since they do not fail.
    """
    failed = [reached(count) <= left for count in counts]
    first = next((number for number, pair in enumerate(pairwise([*failed, True])) if all(pair)), None)
    return (counts[-1], True) if first is None else (counts[first], False)


@torch.inference_mode(False)  # whatever the caller has set
def choose_trigger_free(
    network: nn.Module,
    neurons: list[Neuron],
    num_classes: int,
    normalization: Normalization,
    learn: CleanImages,
    judge: CleanImages | None = None,
    config: TriggerFreeConfig | None = None,
    precision: torch.dtype = torch.float32,
    tell: Callable[[str], None] = lambda line: None,
) -> TriggerFree:
    """Say whether a network is backdoored and, if it is, how much of it to prune, from clean images alone.

    Args:
        network: any classifier of images with neurons; it is not changed.
        neurons: sorted by mask.
        num_classes: K, 4 or more.
        normalization: of the network's input.
        learn: clean images for detector and patch.
        judge: clean images on which accuracy is measured, none of which the masks have seen; None: the same.
        config: the settings.
        precision: data type of convolutions and linear layers.
        tell: called with a line about each part before it begins.

    Raises:
        InputError: as ``detection.detect`` and ``stop_of``.
        ValueError: a neuron is not in the network.
    """
    config, size = config or TriggerFreeConfig(), tuple(pixels_of(learn, normalization).shape[1:3])
    detecting = DetectionConfig(precision=precision)
    detection = detect(network, num_classes, size, normalization, learn, detecting, lambda name: tell(SAID + name))
    if not detection.backdoored:
        return TriggerFree(detection, None, config)
    tell(SAID + "patches")
    stop = stop_of(network, neurons, detection.suspect, learn, judge or learn, normalization, config, precision)
    return TriggerFree(detection, stop, config)


def choose_for(
    subject: Subject,
    neurons: list[Neuron],
    config: TriggerFreeConfig,
    precision: torch.dtype = torch.float32,
    tell: Callable[[str], None] = lambda line: None,
) -> TriggerFree:
    """Call ``choose_trigger_free`` for the defender's view: images that were held out are those to judge by."""
    judge = CleanImages.of(replace(subject, clean=subject.held_out)) if subject.held_out else None
    classes, scale = subject.clean.num_classes, subject.normalization
    learn = CleanImages.of(subject)
    return choose_trigger_free(subject.network, neurons, classes, scale, learn, judge, config, precision, tell)


@torch.inference_mode(False)
def stop_of(
    network: nn.Module,
    neurons: list[Neuron],
    suspect: int | None,
    learn: CleanImages,
    judge: CleanImages,
    normalization: Normalization,
    config: TriggerFreeConfig,
    precision: torch.dtype = torch.float32,
) -> Stop:
    """Find where to stop pruning, from clean images alone.

    Args:
        network: untouched; it is not changed.
        neurons: sorted by mask.
        suspect: the class under suspicion; None where it is all of them, for which no patch is learnt.
        learn: clean images from which the patch is learnt.
        judge: clean images on which accuracy is measured; better none that the masks were learnt from.
        normalization: of the network's input.
        config: the settings.
        precision: data type of convolutions and linear layers.

    Raises:
        InputError: all images are of one class, or have not three channels.
        ValueError: a neuron is not in the network.
    """
    network = copy.deepcopy(network).requires_grad_(False).eval()
    parts = [learn] if judge is learn else [learn, judge]
    pixels = [pixels_of(part, normalization) for part in parts]

    def logits_of(count: int) -> Logits:
        return logits_of_pixels(pruned_copy(network, neurons[:count]), normalization, precision)

    @cache
    def accuracy(count: int) -> float:
        return judge.accuracy(pruned_copy(network, neurons[:count]), precision)

    paper = threshold_point(neurons, PAPER_THRESHOLD).count
    points = points_of(neurons)
    counts = within(accuracy, points, config.accuracy_cap / 100)
    if suspect is None:
        return Stop(None, True, None, [Row(count, None, accuracy(count)) for count in counts])
    target = torch.tensor([suspect] * config.patches)
    patches = learn_patches(logits_of(0), pixels[0], learn.labels, target, config, logits_of(counts[-1]))
    every, labels = torch.cat(pixels), torch.cat([part.labels for part in parts])

    @cache
    def reached(count: int) -> float:
        return float(patches.reached(logits_of(count), every, labels).max())

    rows = [Row(count, reached(count), accuracy(count)) for count in counts]
    if reached(0) < LEARNT:
        return Stop(None, True, reached(0), rows)
    floor = min(paper, counts[-1])  # patches fail before some triggers do
    count, abstained = search(reached, [each for each in counts if each >= floor], config.patch_left)
    further, beyond = [each for each in points if each > counts[-1]], None
    if abstained and further:
        failed, never = search(reached, further, config.patch_left)
        beyond = None if never else Row(failed, reached(failed), accuracy(failed))
    return Stop(count, abstained, reached(0), rows, beyond)
