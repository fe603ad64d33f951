"""Calibrators that learn during a run: a bank that grows, and a rate that moves."""

import bisect
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from pyquiet.checks import check_count, check_number, check_word
from pyquiet.scaling.calibration import Calibrator, Ours, keep
from pyquiet.scaling.cells import Cell
from pyquiet.scaling.conformal import Bank, PValue, check_bank, p_values

Update = Literal["frozen", "epoch", "stream", "window"]


class Online(Ours):
    """One bank that takes in scores of first chunks as they are decided, each after its own decision.

    The counts of takeovers are exact where scores come one by one in an order that does not depend on them and are
    exchangeable. Neither can be known here, so no decision is marked as guaranteed.

    Args:
        bank: to begin with. update: "frozen" takes in nothing; "epoch" at the end of a batch of `batch` questions, so
            that decisions do not depend on who comes first; "stream" at once, in the order of arrival, which depends on
            the clock, and is biased where slow chunks are worse; "window" the same, but forgets all but the last
            `window` scores.
    """

    def __init__(
        self, bank: Bank | None = None, *, update: Update = "frozen", window: int | None = None, batch: int = 16,
        n_min: int = 1,
    ) -> None:  # fmt: skip
        check_word("update", update, Update)
        if (window is None) == (update == "window"):
            raise ValueError(f'window must be given with update="window" and only then, got {window} with {update!r}')
        if window is not None:
            check_count("window", window, least=1)
        self.update, self.window, self.n_min = update, window, check_count("n_min", n_min, least=1)
        self.batch = check_count("batch", batch, least=1) if update == "epoch" else None
        self._first = "" if bank is None else check_bank(bank).version
        self._pending: list[float] = []
        self._changes = 0
        self._hold([] if bank is None else bank.scores.tolist())

    def state(self) -> tuple[dict[str, Any], list[float]]:
        """What it has learned: JSON values, and its scores, for "window" in the order of their arrival."""
        learned = {"first": self._first, "changes": self._changes, "pending": list(self._pending)}
        return learned, list(self._recent) if self.window is not None else list(self._sorted)

    def restore(self, learned: Mapping[str, Any], scores: Sequence[float]) -> None:
        """Takes on what another one of the same settings has learned, as `state` tells it."""
        self._first, self._changes, self._pending = learned["first"], learned["changes"], list(learned["pending"])
        self._hold(scores)

    @property
    def sizes(self) -> tuple[int, ...]:
        """What p-values are ranked among, where that is known beforehand: of a bank that does not grow."""
        n = len(self._sorted)
        return (n,) if self.update == "frozen" and n >= self.n_min else ()

    @property
    def bank(self) -> Bank:
        """The scores it holds now."""
        return Bank(np.asarray(self._sorted, dtype=np.float64))

    @property
    def version(self) -> str:
        return f"{self.update}-{self._first}-{self._changes}"

    def p_value(self, score: float, cell: Cell, uniform: float) -> PValue | None:
        n = len(self._sorted)
        if n < self.n_min:
            return None
        below, upto = bisect.bisect_left(self._sorted, score), bisect.bisect_right(self._sorted, score)
        why = "exact only if first chunks come one by one, in an order that does not depend on their scores"
        return PValue(*p_values(below, upto, n, uniform), n, self.version, False, why, watch=not cell.turn)

    def observe(self, score: float, cell: Cell, took_over: bool) -> None:
        if cell.turn:
            return
        if self.update == "epoch":
            self._pending.append(score)
        elif self.update != "frozen":
            self._take(score)

    def advance(self) -> None:
        for score in sorted(self._pending):
            self._take(score)
        self._pending.clear()

    def rate(self, takeover_rate: float) -> float:
        return takeover_rate

    def keep(self) -> Callable[[], None]:
        return partial(self.restore, *self.state())

    def _hold(self, scores: Sequence[float]) -> None:
        self._sorted, self._recent = sorted(scores), deque(scores)

    def _take(self, score: float) -> None:
        bisect.insort(self._sorted, score)
        self._changes += 1
        if self.window is not None:
            self._recent.append(score)
            while len(self._recent) > self.window:
                old = self._recent.popleft()
                del self._sorted[bisect.bisect_left(self._sorted, old)]


class Adaptive(Ours):
    """Moves the rate by what happened, rho + step (rho* - 1{takeover}), so that it is kept in the long run (ACI).

    For any sequence of scores at all, |mean takeover rate - rho*| <= (max(rho_1, 1 - rho_1) + step) / (step N) after N
    decisions (Gibbs and Candes, 2021). Nothing is promised of a single decision.
    """

    def __init__(self, base: Calibrator, *, step: float = 0.02) -> None:
        if isinstance(base, type) or not hasattr(base, "p_value"):
            raise TypeError(f"base must be a calibrator, such as Pooled(bank), got {base!r}")
        check_number("step", step)
        if not 0 < step < 1:
            raise ValueError(f"step must lie between 0 and 1, got {step}")
        self.base, self.step = base, step
        self.taken = self.seen = 0  # decisions so far

    @property
    def taxonomy(self) -> Mapping[str, str]:
        """That of the base."""
        return getattr(self.base, "taxonomy", {})

    @taxonomy.setter
    def taxonomy(self, told: Mapping[str, str]) -> None:
        setattr(self.base, "taxonomy", told)  # noqa: B010  a foreign one may have none yet

    @property
    def version(self) -> str:
        return f"{self.base.version}-{self.seen}-{self.taken}"

    @property
    def batch(self) -> int | None:
        """Questions between which the base learns, if that is so."""
        return getattr(self.base, "batch", None)

    def p_value(self, score: float, cell: Cell, uniform: float) -> PValue | None:
        p = self.base.p_value(score, cell, uniform)
        if p is None:
            return None
        why = "adaptive: the rate is kept in the long run only"
        return PValue(p.low, p.high, p.smoothed, p.n, self.version, False, why)

    def observe(self, score: float, cell: Cell, took_over: bool) -> None:
        self.base.observe(score, cell, took_over)
        self.seen, self.taken = self.seen + 1, self.taken + took_over

    def advance(self) -> None:
        self.base.advance()

    def rate(self, takeover_rate: float) -> float:
        return takeover_rate + self.step * (self.seen * takeover_rate - self.taken)

    def keep(self) -> Callable[[], None]:
        base, seen, taken = keep(self.base), self.seen, self.taken

        def take_back() -> None:
            base()
            self.seen, self.taken = seen, taken

        return take_back
