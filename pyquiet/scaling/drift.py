"""A watch on p-values: are they still uniform, as they must be where the promise holds?"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

_BETS = (0.2, 0.4, 0.6, 0.8)  # exponents of the power martingales: small p-values win


@dataclass
class DriftMonitor:
    """A conformal martingale of smoothed p-values (Vovk, Gammerman and Shafer, 2005).

    It bets on p-values being too small and on their being too large, in equal parts and at several strengths. Where
    the p-values are independent and uniform its capital is a fair game's that begins at 1, so that it ever reaches
    1 / level with probability at most `level`: then it warns, once, and calls `on_drift`. P-values in one bank of n
    scores are independent only as long as there are far fewer of them than n; false alarms grow when it watches longer.

    Attributes:
        level: probability of a false alarm where p-values are independent.
    """

    level: float = 0.01
    on_drift: Callable[[], None] | None = None
    alarmed: bool = field(default=False, init=False)
    seen: int = field(default=0, init=False)
    _logs: list[float] = field(default_factory=lambda: [0.0] * (2 * len(_BETS)), init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {self.level}")

    @property
    def log_capital(self) -> float:
        """Natural logarithm of the capital."""
        top = max(self._logs)
        return top + math.log(sum(math.exp(log - top) for log in self._logs) / len(self._logs))

    def see(self, p: float) -> None:
        """Takes in the next p-value, in (0, 1)."""
        self.seen += 1
        for i, bet in enumerate(_BETS):  # density bet * p^(bet - 1) integrates to 1
            self._logs[2 * i] += math.log(bet) + (bet - 1) * math.log(p)
            self._logs[2 * i + 1] += math.log(bet) + (bet - 1) * math.log1p(-p)
        if not self.alarmed and self.log_capital >= -math.log(self.level):
            self.alarmed = True
            warnings.warn(
                f"after {self.seen} decisions the p-values are not uniform any more (level {self.level}): the scores "
                "have drifted away from the bank, and the takeover rate is not what was promised; calibrate again",
                stacklevel=2,
            )
            if self.on_drift is not None:
                self.on_drift()
