"""FT: train on with the clean images (a row of Wu & Wang, NeurIPS 2021, table 1, for each of two learning rates)."""

from dataclasses import dataclass
from typing import ClassVar

from defenses.tuning import TuningConfig, TuningLoop


@dataclass(frozen=True)
class FineTuning(TuningConfig):
    """Fine-tuning; the paper's rates are 0.01 and 0.02."""

    title: ClassVar[str] = "FT"
    loop: ClassVar[type[TuningLoop]] = TuningLoop
