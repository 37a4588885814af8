"""Which neurons to prune: sweeps over a sorted list, and the operating point (Wu & Wang, NeurIPS 2021, section 4.3)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

from models.neurons import Neuron, PruningPoint, threshold_point
from utils.config import Config, Range, setting

PAPER_THRESHOLD = 0.2  # the operating point of the paper
LAST_THRESHOLD, THRESHOLD_STEP = 0.9, 0.05
ACCEPTED_DROP = 3.0  # percentage points; the default of a sweep by number, for which the paper names no point
SWEEP_SHARES = 80  # a sweep by number takes steps of 1/80 of the neurons, 1.25 %, as in the release's figure


@dataclass(frozen=True)
class SweepConfig(Config):
    """The points of a sweep."""

    pruning_by: str = setting(
        "threshold", "sweep over thresholds or over numbers of neurons", choices=("threshold", "number")
    )
    pruning_max: float | None = setting(
        None,
        "last point of the sweep: a threshold, 0 to 1, or a number of neurons "
        f"(default: {LAST_THRESHOLD:.2f}, or all neurons)",
        Range(0),
    )
    pruning_step: float | None = setting(
        None,
        f"distance of two points (default: {THRESHOLD_STEP}, or 1/{SWEEP_SHARES} of the neurons)",
        Range(0, open_low=True),
    )

    def __post_init__(self):
        super().__post_init__()
        limits = {"pruning_max": self.pruning_max, "pruning_step": self.pruning_step}
        given = {"--" + name.replace("_", "-"): value for name, value in limits.items() if value is not None}
        for flag, value in given.items():
            if self.pruning_by == "number" and not (value >= 1 and value == int(value)):
                raise ValueError(f"{flag} {value:g}: --pruning-by number counts in whole neurons, 1 or more")
        if self.pruning_by == "number" and given.get("--pruning-step", 0) > given.get("--pruning-max", math.inf):
            raise ValueError(f"--pruning-step {self.pruning_step:g} is past --pruning-max: a sweep without a point")
        if self.pruning_by == "threshold" and given.get("--pruning-max", 0) > 1:
            raise ValueError(
                f"--pruning-max {self.pruning_max:g}: masks lie in 0..1 (a number of neurons needs --pruning-by number)"
            )
        if self.pruning_by == "threshold" and given.get("--pruning-step", 1) < 1e-4:
            raise ValueError(
                f"--pruning-step {self.pruning_step:g}: masks have 4 decimals, a smaller step shows nothing new"
            )

    def points(self, neurons: list[Neuron]) -> list[PruningPoint]:
        """Return the points for neurons that are sorted by mask."""
        maximum, step = self.pruning_max, self.pruning_step
        if self.pruning_by == "threshold":
            return threshold_points(neurons, LAST_THRESHOLD if maximum is None else maximum, step or THRESHOLD_STEP)
        return number_points(
            neurons, len(neurons) if maximum is None else maximum, step or max(1, len(neurons) // SWEEP_SHARES)
        )


@dataclass(frozen=True)
class ChoiceConfig(Config):
    """How the operating point is chosen, from clean data alone."""

    threshold: float | None = setting(
        None,
        f"operating point: prune every neuron with mask <= X (default of a sweep by threshold: the paper's "
        f"{PAPER_THRESHOLD})",
        Range(0, 1),
    )
    number: int | None = setting(None, "operating point: prune the N neurons of smallest mask", Range(0))
    max_acc_drop: float | None = setting(
        None,
        "operating point: the last of the sweep that costs at most this many percentage points of accuracy on the "
        f"defender's clean images (default of a sweep by number: {ACCEPTED_DROP:g})",
        Range(0, 100),
        metavar="POINTS",
    )
    trigger_free: bool = setting(
        False,
        "operating point: none where no backdoor is found; else at least the paper's threshold, and further until a "
        "patch that stands in for the trigger has lost its force (docs/trigger_free.md)",
    )

    def __post_init__(self):
        super().__post_init__()
        given = [value is not None for value in (self.threshold, self.number, self.max_acc_drop)]
        if sum([*given, self.trigger_free]) > 1:
            raise ValueError("choose one of threshold, number, max_acc_drop and trigger_free")


def _steps(maximum: float, step: float) -> Iterator[Decimal]:
    """Yield 0, step, 2 * step, ... up to and including maximum, in exact decimals."""
    step, maximum = Decimal(str(step)), Decimal(str(maximum))
    if step <= 0 or maximum < 0:
        raise ValueError(f"a sweep needs a step above 0 and a maximum of at least 0, got {step} and {maximum}")
    for number in range(int(maximum / step) + 1):
        yield number * step


def threshold_points(neurons: list[Neuron], maximum: float, step: float) -> list[PruningPoint]:
    """Plan a sweep over thresholds 0, step, 2 * step, ... up to and including ``maximum``.

    Args:
        neurons: sorted by mask.
        maximum: largest threshold, 0..1.
        step: distance of the thresholds, above 0.

    Raises:
        ValueError: a number is out of range.
    """
    return [threshold_point(neurons, threshold) for threshold in map(float, _steps(maximum, step))]


def number_points(neurons: list[Neuron], maximum: float, step: float) -> list[PruningPoint]:
    """Plan a sweep that prunes step, 2 * step, ... neurons, never past ``maximum`` or the end of the list.

    Args:
        neurons: sorted by mask.
        maximum: largest number of neurons.
        step: whole number of neurons, at least 1.

    Raises:
        ValueError: a number is out of range.
    """
    counts = [int(count) for count in _steps(min(maximum, len(neurons)), step)][1:]
    return [_number_point(neurons, count) for count in counts]


def _number_point(neurons: list[Neuron], count: int) -> PruningPoint:
    if count > len(neurons):
        raise ValueError(f"{count} neurons cannot be pruned, there are {len(neurons)}")
    return PruningPoint(count, neurons[count - 1] if count else None, None)


@dataclass(frozen=True)
class Choice:
    """An operating point, what it prunes in words, and why it was chosen."""

    point: PruningPoint
    words: str
    reason: str


def largest_within_drop(accuracies: list[float], max_drop: float) -> int:
    """Return the number of the last row that costs at most ``max_drop`` of accuracy.

    Args:
        accuracies: on the defender's clean images, 0..1; the first row is the untouched network.
        max_drop: the largest accepted drop, 0..1.
    """
    floor = accuracies[0] - max_drop - 1e-9
    return max(number for number, accuracy in enumerate(accuracies) if accuracy >= floor)


def choose(neurons: list[Neuron], points: list[PruningPoint], accuracies: list[float], config: ChoiceConfig) -> Choice:
    """Choose the operating point from clean data alone.

    Args:
        neurons: sorted by mask.
        points: of a sweep, the untouched network first.
        accuracies: of each point on the defender's clean images, 0..1.
        config: a fixed threshold or number, or the largest accepted drop.

    Raises:
        ValueError: there are not so many neurons, or the choice takes more than accuracies: ``choose_trigger_free``.
    """
    if config.trigger_free:
        raise ValueError("trigger_free is no choice from accuracies; call defenses.trigger_free.choose_trigger_free")
    if config.number is not None:
        return choice_of(neurons, config.number, "--number")
    max_drop = config.max_acc_drop
    if config.threshold is None and max_drop is None and all(point.threshold is None for point in points):
        max_drop = ACCEPTED_DROP
    if max_drop is not None:
        point = points[largest_within_drop(accuracies, max_drop / 100)]
        drop = f"{max_drop:g} point{'' if max_drop == 1 else 's'}"
        reason = f"the last point of the sweep that costs at most {drop} of accuracy on the defender's clean images"
        return Choice(point, _in_words(point), reason)
    point = threshold_point(neurons, PAPER_THRESHOLD if config.threshold is None else config.threshold)
    reason = "the paper's fixed threshold" if config.threshold is None else "--threshold"
    return Choice(point, _in_words(point), reason)


def choice_of(neurons: list[Neuron], count: int, reason: str) -> Choice:
    """Return the choice to prune the ``count`` neurons of smallest mask; raises ``ValueError`` if there are fewer."""
    point = _number_point(neurons, count)
    return Choice(point, _in_words(point), reason)


def _in_words(point: PruningPoint) -> str:
    if point.mask is None:
        return "prune nothing"
    if point.threshold is None:
        return f"prune the {point.count} neurons of smallest mask, up to {point.mask:g}"
    return f"prune every neuron with mask <= {point.threshold:g}"
