"""Cold start: what a chunk is ranked among while the bank holds too few scores."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from pyquiet.scaling.calibration import Calibrator, Hierarchical, PerQuestion, PerTurn, Pooled, hashed, keep
from pyquiet.scaling.cells import Cell
from pyquiet.scaling.conformal import PValue
from pyquiet.scaling.learning import Adaptive, Online
from pyquiet.scaling.spent import Spent


class ColdStart:
    """Ranks among first chunks that were drafted for the question beforehand, where `base` has no bank for it yet.

    Exact for the question's first turn if who is ranked so does not depend on the clock.

    Attributes:
        own: banks of these first chunks, by question.
    """

    def __init__(self, base: Calibrator) -> None:
        self.base, self.own = base, PerQuestion()
        still = isinstance(base, Pooled | Hierarchical | PerTurn)
        self._settled = still or (isinstance(base, Online) and base.update in ("frozen", "epoch"))

    @property
    def version(self) -> str:
        return hashed([self.base.version, self.own.version])

    @property
    def batch(self) -> int | None:
        """Questions between which the base learns, if that is so."""
        return getattr(self.base, "batch", None)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Those of the base."""
        return getattr(self.base, "sizes", ())

    def has_bank(self, cell: Cell) -> bool:
        """Whether no chunks need to be drafted for the question beforehand."""
        return is_warm(self.base, cell) or self.own.has_bank(cell)

    def set(self, question: str, scores: Sequence[float]) -> None:
        """Gives a question, by its name in banks, a bank of its own."""
        self.own.set(question, scores)

    def p_value(self, score: float, cell: Cell, uniform: float) -> PValue | None:
        p = self.base.p_value(score, cell, uniform)
        if p is not None:
            return p
        p = self.own.p_value(score, cell, uniform)
        if p is None or self._settled or not p.guaranteed:
            return p
        why = "which questions are ranked among first chunks of their own depends on the clock"
        return replace(p, guaranteed=False, why=why)

    def observe(self, score: float, cell: Cell, took_over: bool) -> None:
        self.base.observe(score, cell, took_over)

    def advance(self) -> None:
        self.base.advance()

    def rate(self, takeover_rate: float) -> float:
        return self.base.rate(takeover_rate)

    def keep(self) -> Callable[[], None]:
        """What takes both back to what they know now."""
        base, own = keep(self.base), keep(self.own)

        def take_back() -> None:
            base()
            own()

        return take_back


def is_warm(calibrator: Calibrator, cell: Cell) -> bool:
    """Whether there is a bank for the cell's scores."""
    return calibrator.p_value(0.0, cell, 0.5) is not None


def presampled(calibrator: Calibrator | None) -> PerQuestion | ColdStart | None:
    """What of a calibrator is filled with first chunks that are drafted beforehand, if anything is."""
    if isinstance(calibrator, Adaptive):
        return presampled(calibrator.base)
    return calibrator if isinstance(calibrator, PerQuestion | ColdStart) else None


def spent_on(calibrator: Calibrator) -> Spent | None:
    """What was spent to make a calibrator, or the one inside of it, if anybody knows."""
    own: Spent | None = getattr(calibrator, "spent", None)
    return spent_on(calibrator.base) if own is None and isinstance(calibrator, Adaptive | ColdStart) else own
