"""A watch on p-values: are they still what they must be where the promise holds?"""

import bisect
import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

from pyquiet.checks import check_number

_BETS = (0.2, 0.4, 0.6, 0.8)  # exponents of the power martingales: small p-values win


@dataclass(frozen=True)
class Alarm:
    """Scores of a turn have left the bank: its game's capital was `e_value` after `seen` of its p-values."""

    turn: int
    seen: int
    e_value: float

    def __str__(self) -> str:
        return (
            f"scores of turn {self.turn} have drifted away from the bank (e-value {self.e_value:.3g} after "
            f"{self.seen} p-values), so takeovers are not as frequent as promised: calibrate again"
        )


@dataclass
class DriftMonitor:
    """A conformal martingale for each turn (Vovk, Gammerman and Shafer, 2005).

    It bets on p-values being too small and on their being too large, in equal parts and at several strengths. Its
    capital is a fair game's that begins at 1, so that it ever reaches 1 / level with probability at most `level`; of
    several turns the i-th to be seen must reach i (i + 1) / level. Then there is an alarm, one for each turn.

    P-values in one bank are alike, since they share the bank, and would bankrupt a fair game once there are as many of
    them as scores in the bank. So what is bet on is each one's rank among the bank and the p-values before it, which is
    uniform and independent of all earlier ones however many there are. That law is exact for smoothed p-values of
    scores that are exchangeable with the bank's, no two of a question, in an order that does not depend on them. Where
    questions have several scores in the bank (`Hierarchical`), p-values lie nearer the middle than uniform ones; where
    chunks are judged as they are ready (async engine), slow ones come late.

    Attributes:
        level: probability of a false alarm. freeze: whether a calibrator that learns stops at the first alarm, so that
            what has drifted does not enter the bank; decisions after it then depend on the order of those before.
        alarms: by turn.
    """

    level: float = 0.01
    freeze: bool = False
    alarms: dict[int, Alarm] = field(default_factory=dict, init=False)
    seen: Counter[int] = field(default_factory=Counter, init=False)  # p-values of each turn
    _games: dict[int, list[float]] = field(default_factory=dict, init=False, repr=False)
    _before: dict[str, list[float]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_number("level", self.level)
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {self.level}")

    @property
    def settings(self) -> dict[str, Any]:
        """What makes another one like it, as JSON values."""
        return {"level": self.level, "freeze": self.freeze}

    @property
    def frozen(self) -> bool:
        """Whether calibrators shall learn no more."""
        return self.freeze and bool(self.alarms)

    def fresh(self) -> Self:
        """One that has seen nothing, for a run of its own."""
        return replace(self)

    def begin(self) -> None:
        """A run begins: forgets what it has seen, as reports, which know one run, do."""
        vars(self).update(vars(self.fresh()))

    def keep(self) -> Callable[[], None]:
        """What takes it back to what it has seen by now."""
        now = copy.deepcopy(vars(self))
        return lambda: vars(self).update(copy.deepcopy(now))

    def log_capital(self, turn: int = 0) -> float:
        """Natural logarithm of a turn's capital."""
        logs = self._games.get(turn, [0.0])
        top = max(logs)
        return top + math.log(sum(math.exp(log - top) for log in logs) / len(logs))

    def see(self, p: float, *, n: int = 0, bank: str = "", turn: int = 0) -> Alarm | None:
        """Takes in the next p-value, in (0, 1), of a score of this turn in a bank of n scores and that name.

        Gives the turn's alarm if this p-value has set it off. n = 0 is for p-values that are independent of each other
        as they are.
        """
        self.seen[turn] += 1
        p = self._rank(p, n, bank) if n else p
        logs = self._games.setdefault(turn, [0.0] * (2 * len(_BETS)))
        for i, bet in enumerate(_BETS):  # density bet * p^(bet - 1) integrates to 1
            logs[2 * i] += math.log(bet) + (bet - 1) * math.log(p)
            logs[2 * i + 1] += math.log(bet) + (bet - 1) * math.log1p(-p)
        place = 1 + list(self._games).index(turn)
        if turn in self.alarms or self.log_capital(turn) < math.log(place * (place + 1) / self.level):
            return None
        self.alarms[turn] = Alarm(turn, self.seen[turn], e_value(self.log_capital(turn)))
        return self.alarms[turn]

    def _rank(self, p: float, n: int, bank: str) -> float:
        """Where p lies among the ends of the bank's n + 1 ranks and earlier p-values, all made evenly spaced."""
        before = self._before.setdefault(bank, [])
        gap = min(int(p * (n + 1)), n)
        place = bisect.bisect_left(before, p)
        left, right = gap / (n + 1), (gap + 1) / (n + 1)
        left = max(left, before[place - 1]) if place else left
        right = min(right, before[place]) if place < len(before) else right
        inside = min(max((p - left) / (right - left), 2.0**-53), 1 - 2.0**-53) if right > left else 0.5
        rank = (gap + place + inside) / (n + len(before) + 1)
        before.insert(place, p)
        return rank


def e_value(log_capital: float) -> float:
    """The capital, at most the largest float, since JSON has no infinity."""
    return math.exp(min(log_capital, 709.0))
