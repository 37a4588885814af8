"""Does every class of a network go to another one? What the detector makes of all-to-all attacks, without the trigger.

``detection.confusion`` says how probable class t is for images of class s while all neurons are perturbed a little:
P[s, t]. The net flow from s to t is P[s, t] - P[t, s]; what two classes that look alike are confused goes both ways and
cancels. An assignment gives each class another one, no two the same. In the mean of its flows a class that attracts
others cancels, too, as it is once source and once target, while what an all-to-all attack adds (y -> y + 1; Gu et al.,
*BadNets*, IEEE Access 2019) stays. The statistic is by how much the best assignment's mean exceeds that of the next one
which has no pair in common with it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

PER_CLASS = 40  # clean images, on average: with fewer the flow is noise
# Mean and standard deviation of the statistic of nine benign networks, see docs/detection.md.
BENIGN_MEAN, BENIGN_DEVIATION, BENIGN_COUNT = 0.01242, 0.00331, 9


@dataclass(frozen=True)
class Assignment:
    """The best assignment, and how far it stands out.

    Attributes:
        targets: by class, the class that it is assigned to.
        flows: by class, its net flow to there, -1..1.
        ahead: mean of the flows, less that of the next assignment.
        p_value: 0..1; how likely a benign network is that far ahead.
    """

    targets: list[int]
    flows: list[float]
    ahead: float
    p_value: float

    @classmethod
    def of(cls, confusion: Tensor) -> "Assignment":
        """Find it; ``ahead`` is compared with a gamma distribution that was fitted to benign networks.

        Args:
            confusion: float (K, K), K of 4 or more; how probable class t is for images of class s.
        """
        flow = (confusion - confusion.T).double()
        flow.fill_diagonal_(-torch.inf)
        targets, sources = best_assignment(flow), torch.arange(len(flow))
        flows = flow[sources, targets]
        flow[sources, targets] = -torch.inf
        ahead = flows.mean() - flow[sources, best_assignment(flow)].mean()
        mean = torch.tensor(BENIGN_MEAN, dtype=torch.float64)
        variance = BENIGN_DEVIATION**2 * (1 + 1 / BENIGN_COUNT)  # of one more network of the kind
        p_value = torch.special.gammaincc(mean.square() / variance, ahead.clamp_min(0) * mean / variance)
        return cls(targets.tolist(), flows.tolist(), float(ahead), float(p_value))


def best_assignment(flow: Tensor) -> Tensor:
    """Return the target of each class in the assignment of the largest sum: int64 (K,); -inf forbids a pair."""
    from scipy.optimize import linear_sum_assignment  # takes a third of a second, and only detectors need it

    return torch.from_numpy(linear_sum_assignment(flow.numpy(), maximize=True)[1])
