"""What it took to fill a bank, kept with it for those who use it later."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pyquiet.scaling.figures import Cost, calibration_span, cost
from pyquiet.scaling.table import Table


@dataclass(frozen=True)
class Spent:
    """Seconds, and requests and tokens by stage."""

    seconds: float
    cost: Mapping[str, Cost]

    @classmethod
    def of(cls, calibration: Table) -> "Spent":
        """By the records of a calibration."""
        return cls(calibration_span(calibration), cost(calibration.rows()))

    @property
    def tokens(self) -> int:
        """Tokens written."""
        return sum(cost.completion_tokens for cost in self.cost.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Spent":
        """That of `to_dict`."""
        return cls(values["seconds"], {stage: Cost(**counts) for stage, counts in values["cost"].items()})

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s and {self.tokens} tokens written"
