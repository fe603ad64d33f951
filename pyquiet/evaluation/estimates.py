"""Means and how far they may be off."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, which is nan for a single value."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> "Estimate":
        """The estimate from independent values [n], n >= 1."""
        mean, error = mean_and_error(values.double())
        return cls(float(mean), float(error))

    @classmethod
    def geometric(cls, values: Tensor) -> "Estimate":
        """The geometric mean of positive values [n], which no single large one rules, and its error to first order."""
        log = cls.of(values.double().log())
        return cls(math.exp(log.mean), math.exp(log.mean) * log.error)

    @classmethod
    def jackknife(cls, value: float, without: Tensor) -> "Estimate":
        """A statistic of n texts, whatever it is, and its error from what it is without each of them, [n]."""
        n = len(without)
        spread = (without.double() - without.double().mean()).square().sum() * (n - 1) / n
        return cls(value, float(spread.sqrt()) if n > 1 else float("nan"))

    def to_dict(self) -> dict[str, float | None]:
        """`mean` and `standard_error` as JSON knows them: None for what is not finite."""
        return {"mean": finite(self.mean), "standard_error": finite(self.error)}

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if math.isnan(self.error) else f"{self.mean:.4g} +- {self.error:.2g}"


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [...] of independent values [..., n] and its standard error, nan where n is 1."""
    n, mean = values.shape[-1], values.mean(-1)
    variance = (values - mean[..., None]).square().sum(-1) / (n - 1 or float("nan"))
    return mean, (variance / n).sqrt()


def aligned(table: Sequence[Sequence[str]]) -> str:
    """A table of words, each column as wide as it must be and flush right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in table)


def finite(number: float) -> float | None:
    """The number, or None where it is infinite or nan, which JSON has no word for."""
    return number if math.isfinite(number) else None
