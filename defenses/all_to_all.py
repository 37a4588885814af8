"""Does every class of a network go to another one? What the detector makes of all-to-all attacks, without the trigger.

``detection.confusion`` says how probable class t is for images of class s while all neurons are perturbed a little:
P[s, t]. The net flow from s to t is P[s, t] - P[t, s]; what two classes that look alike are confused goes both ways and
cancels. An assignment gives each class another one, no two the same. In the mean of its flows a class that attracts
others cancels, too, as it is once source and once target, while what an all-to-all attack adds (y -> y + 1; Gu et al.,
*BadNets*, IEEE Access 2019) stays. The statistic is by how much the best assignment's mean exceeds that of the next one
which has no pair in common with it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# What the reference was measured with, see docs/detection.md: nine benign networks, mean and standard deviation.
CLASSES, PER_CLASS = 10, 25  # of other numbers of classes nothing is known; images of each class at least
EPS, STEPS = 0.025, 3  # of the noise, in float32
BENIGN_MEAN, BENIGN_DEVIATION, BENIGN_COUNT = 0.01242, 0.00331, 9


@dataclass(frozen=True)
class Assignment:
    """The best assignment, and how far it stands out.

    Attributes:
        targets: by class, the class that it is assigned to.
        flows: by class, its net flow to there, -1..1.
        ahead: mean of the flows, less that of the next assignment.
        p_value: 0..1; how likely one more benign network of the kind is that far ahead.
    """

    targets: list[int]
    flows: list[float]
    ahead: float
    p_value: float

    @classmethod
    def of(cls, confusion: Tensor) -> "Assignment":
        """Find it, and compare ``ahead`` with the benign networks: Student's t of one more of them.

        Args:
            confusion: float (K, K), K of 4 or more; how probable class t is for images of class s. The p-value holds
                for the ``CLASSES``, images and noise that the benign networks were measured with.

        Raises:
            ValueError: it has another shape, or values that are not finite.
        """
        from scipy.special import stdtr  # takes a while, and only detectors need it

        count = len(confusion)
        if confusion.shape != (count, count) or count < 4 or not bool(torch.isfinite(confusion).all()):
            raise ValueError(f"confusion {tuple(confusion.shape)}; expected finite values (K, K), K of 4 or more")
        confusion = confusion.detach().cpu().double()
        flow, sources = confusion - confusion.T, torch.arange(count)
        flow.fill_diagonal_(-torch.inf)
        targets = _best_assignment(flow)
        flows = flow[sources, targets]
        flow[sources, targets] = -torch.inf
        ahead = float(flows.mean() - flow[sources, _best_assignment(flow)].mean())
        deviation = BENIGN_DEVIATION * math.sqrt(1 + 1 / BENIGN_COUNT)
        p_value = float(stdtr(BENIGN_COUNT - 1, (BENIGN_MEAN - ahead) / deviation))
        return cls(targets.tolist(), flows.tolist(), ahead, p_value)


def _best_assignment(flow: Tensor) -> Tensor:
    """Return the target of each class in the assignment of the largest sum: int64 (K,); -inf forbids a pair."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(flow.numpy(), maximize=True)[1])
