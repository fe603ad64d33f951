"""Conformal p-values of scores against a bank of earlier ones, and rules that turn them into decisions.

Scores are larger where things are worse. Where the bank's scores and the new one are exchangeable, each rule's rate of
takeovers is known for any number of scores (arXiv 2509.15148; Vovk et al., 2005); the docstrings say which.
"""

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pyquiet.checks import check_count, check_number, check_word

Tail = Literal["budget", "coverage", "smoothed"]
Label = Literal["accept", "takeover", "discard"]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Bank:
    """Scores [n] of one kind, in order, and of which question each is: what new scores are ranked in.

    Raises ValueError for scores that are not finite, or for other than one group a score.
    """

    scores: Floats
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        scores = np.asarray(self.scores, dtype=np.float64)
        groups = tuple(self.groups) or ("",) * len(scores)
        if scores.ndim != 1 or not np.isfinite(scores).all():
            raise ValueError(f"scores must be finite numbers [n], got {scores}")
        if len(groups) != len(scores):
            raise ValueError(f"groups must name one question a score, got {len(groups)} for {len(scores)} scores")
        order = np.argsort(scores, kind="stable")
        set_ = object.__setattr__
        set_(self, "scores", scores[order])
        set_(self, "groups", tuple(groups[i] for i in order))

    @cached_property
    def version(self) -> str:
        """A hash of the scores and their groups, whatever order they came in."""
        ordered = [group for _, group in sorted(zip(self.scores.tolist(), self.groups, strict=True))]
        digest = hashlib.blake2b((self.scores + 0.0).tobytes(), digest_size=8)  # + 0.0: no negative zero
        digest.update(np.array([len(name) for name in ordered], dtype=np.int64).tobytes())
        digest.update("".join(ordered).encode())
        return digest.hexdigest()

    @property
    def size(self) -> int:
        """How many scores there are, n."""
        return len(self.scores)

    def add(self, scores: Sequence[float], groups: Sequence[str] = ()) -> "Bank":
        """A bank with these scores too."""
        more = tuple(groups) or ("",) * len(scores)
        return Bank(np.concatenate([self.scores, np.asarray(scores, dtype=np.float64)]), self.groups + more)

    def counts(self, score: float) -> tuple[int, int]:
        """How many scores are below this one, and how many equal it."""
        low = int(self.scores.searchsorted(score))
        return low, int(self.scores.searchsorted(score, "right")) - low


def check_bank(bank: Bank) -> Bank:
    """The bank, if it is one; else a TypeError that names it."""
    if not isinstance(bank, Bank):
        raise TypeError(f"bank must be a Bank(scores, groups), got {bank!r}")
    return bank


def p_values(under: float, upto: float, n: float, uniform: float) -> tuple[float, float, float]:
    """Low, high and smoothed p-value of a score that `under` of n lie below, and `upto` below or at."""
    low, high, above = 1 + n - under, 1 + upto, n - upto
    return low / (n + 1), high / (n + 1), (above + uniform * (low - above)) / (n + 1)


def p_low(bank: Bank, score: float) -> float:
    """(1 + #{U_i >= u}) / (n + 1): small where a score is unusually bad; P(p <= a) <= a for exchangeable scores."""
    return _rank(bank, score, 0.0)[0]


def p_high(bank: Bank, score: float) -> float:
    """(1 + #{U_i <= u}) / (n + 1): large where a score is bad; the paper's p-value."""
    return _rank(bank, score, 0.0)[1]


def p_smoothed(bank: Bank, score: float, uniform: float) -> float:
    """(#{U_i > u} + v (1 + #{U_i = u})) / (n + 1) with v uniform: uniform for exchangeable scores, ties or not."""
    return _rank(bank, score, uniform)[2]


def _rank(bank: Bank, score: float, uniform: float) -> tuple[float, float, float]:
    below, equal = bank.counts(score)
    return p_values(below, below + equal, bank.size, uniform)


@dataclass(frozen=True, slots=True)
class PValue:
    """A score's p-values in a bank of n scores, or n questions where those are what is exchangeable.

    Attributes:
        low, high, smoothed: as the functions of that name. version: of the bank.
        guaranteed: whether a rule's promise holds exactly for it. why: one line that says why or why not.
        uniform: whether the smoothed one is exactly uniform where the scores are exchangeable.
        watch: whether it is worth a drift monitor's while though nothing is guaranteed.
    """

    low: float
    high: float
    smoothed: float
    n: int
    version: str
    guaranteed: bool
    why: str
    uniform: bool = True
    watch: bool = False


def rank(bank: Bank, score: float, uniform: float, *, guaranteed: bool, why: str) -> PValue:
    """The p-values of a score in a bank whose scores all count alike."""
    return PValue(*_rank(bank, score, uniform), bank.size, bank.version, guaranteed, why)


class ClusteredBank:
    """A bank of questions that had M chains each, whose scores are alike (after Lee, Barber and Willett, 2023).

    p_low = (1 + #{U_i >= u} / M) / (1 + n / M), p_high likewise: a new question counts as M scores, all as bad as this
    one. Valid for a chain of a new question that has a score, though more chains of some questions have one than of
    others: of all scores, its question's included, it is equally likely to be each. (A mean for every question would
    count those of few scores too much.) The smoothed one is uniform only where M is 1. O(log n) a p-value.

    Args:
        chains: M. None, or less than there are scores of some question: the most of one.
    """

    def __init__(self, bank: Bank, chains: int | None = None) -> None:
        if chains is not None:
            check_count("chains", chains, least=1)
        _, counts = np.unique(np.asarray(bank.groups), return_counts=True)
        self.bank, self.chains = bank, max(chains or 1, int(counts.max(initial=1)))

    @property
    def questions(self) -> int:
        """As how many questions it counts: n / M, rounded down."""
        return self.bank.size // self.chains

    def rank(self, score: float, uniform: float, *, guaranteed: bool, why: str) -> PValue:
        """The p-values of a score."""
        below, equal = self.bank.counts(score)
        under, upto, n = (count / self.chains for count in (below, below + equal, self.bank.size))
        ps = p_values(under, upto, n, uniform)
        return PValue(*ps, self.questions, self.bank.version, guaranteed, why, uniform=self.chains == 1)


@dataclass(frozen=True)
class Rule:
    """Which p-values call for the target, and what that promises for exchangeable scores.

    - "budget": takeover iff p_low <= rho, so that P(takeover) <= rho; it is floor(rho (n + 1)) / (n + 1) without ties.
    - "coverage": takeover iff p_high > 1 - rho, so that P(takeover) >= rho, and <= rho + 1 / (n + 1) without ties.
    - "smoothed": takeover iff p_smoothed <= rho, so that P(takeover) = rho, whatever n and ties.

    A chunk whose p-value would call for the target even at `discard_rate` is discarded, and drafted again.

    Raises ValueError for a rate outside of (0, 1), a discard_rate outside of [0, takeover_rate], or another tail;
    TypeError for what is no number.
    """

    takeover_rate: float = 0.4
    tail: Tail = "budget"
    discard_rate: float = 0.0

    def __post_init__(self) -> None:
        check_number("takeover_rate", self.takeover_rate)
        check_number("discard_rate", self.discard_rate)
        if not 0 < self.takeover_rate < 1:
            raise ValueError(
                f"takeover_rate must lie between 0 and 1, got {self.takeover_rate}; to never or always take over, run "
                "the draft or the target alone"
            )
        for name in ("takeover_rate", "discard_rate"):  # of numpy, too, which JSON does not know
            object.__setattr__(self, name, float(getattr(self, name)))
        if not 0 <= self.discard_rate <= self.takeover_rate:
            raise ValueError(f"discard_rate must lie in [0, takeover_rate], got {self.discard_rate}")
        check_word("tail", self.tail, ("budget", "coverage", "smoothed"))

    @property
    def alpha(self) -> float:
        """The paper's alpha."""
        return 1 - self.takeover_rate

    def p(self, p: PValue) -> float:
        """The p-value that the rule looks at."""
        return {"budget": p.low, "coverage": p.high, "smoothed": p.smoothed}[self.tail]

    def label(self, p: PValue, rate: float | None = None) -> Label:
        """What becomes of a chunk; `rate` stands in for the takeover rate."""
        rate = self.takeover_rate if rate is None else rate
        if self.discard_rate > 0 and self._fires(p, min(self.discard_rate, rate)):
            return "discard"
        return "takeover" if self._fires(p, rate) else "accept"

    def promise(self, n: int) -> float:
        """P(takeover) for n exchangeable scores without ties."""
        if self.tail == "smoothed":
            return self.takeover_rate
        k = self.takeovers(n)
        return k / (n + 1)

    def takeovers(self, n: int) -> int:
        """How many of the n + 1 ranks call for the target."""
        return self._ranks(self.takeover_rate, n)

    def cut_points(self, bank: Bank) -> tuple[float, float]:
        """The scores above which (coverage: from which on) the target is called, and chunks are discarded.

        Infinite where that never happens. Not for the smoothed rule, whose cut is drawn anew each time.
        """
        if self.tail == "smoothed":
            raise ValueError('tail="smoothed" has no cut points: near the cut its decision is drawn')
        return self._cut(bank, self.takeover_rate), self._cut(bank, self.discard_rate)

    def prediction_set(self, bank: Bank, scores: Sequence[float]) -> list[int]:
        """The chains whose score calls for the target: the paper's budget prediction set C_alpha (coverage tail)."""
        ps = [rank(bank, score, 1.0, guaranteed=False, why="") for score in scores]
        return [i for i, p in enumerate(ps) if self._fires(p, self.takeover_rate)]

    def takeover_count(self, n: int, chains: int) -> tuple[float, int, int]:
        """Mean, 5 % and 95 % point of the takeovers among chains that one bank of n scores judges.

        The rate of one bank is Beta distributed, so the count is beta-binomial (no ties; for the smoothed rule,
        which has a little less spread, the nearest ranks are taken).
        """
        low, high = band(self.takeover_law(n, chains))
        return chains * self.promise(n), low, high

    def takeover_law(self, n: int, chains: int) -> Floats:
        """P(count) of the takeovers that `takeover_count` is about, float64 [chains + 1]."""
        k = min(max(round(self.promise(n) * (n + 1)), 0), n + 1)
        return beta_binomial(chains, k, n + 1 - k)

    def warn_if_idle(self, n: int) -> None:
        """Warns where so few scores let the budget rule never fire, and tells the rates that could be had."""
        if self.tail == "budget" and self.takeovers(n) == 0:
            rates = ", ".join(f"{rate:.3g}" for rate in attainable_rates(n)[1:4])
            warnings.warn(
                f"takeover_rate={self.takeover_rate} is below 1 / (n + 1) for a bank of n = {n} scores: the target is "
                f"never called. Attainable rates are 0, {rates}, ...; take one of these, a larger bank, or "
                f'tail="smoothed"',
                stacklevel=3,
            )

    def _fires(self, p: PValue, rate: float) -> bool:
        if self.tail == "coverage":
            return p.high > 1 - rate + _ROUNDING
        return self.p(p) <= rate + _ROUNDING

    def _cut(self, bank: Bank, rate: float) -> float:
        k = self._ranks(rate, bank.size)
        if k == 0:
            return math.inf
        return -math.inf if k > bank.size else float(bank.scores[bank.size - k])

    def _ranks(self, rate: float, n: int) -> int:
        product = rate * (n + 1)
        return math.ceil(product - _ROUNDING) if self.tail == "coverage" else math.floor(product + _ROUNDING)


NEAR = 1e-6  # a score this close to a cut may fall to the other side when it is computed anew
_ROUNDING = 1e-12  # p-values are fractions of n + 1, and rates decimals: 0.3 * 10 must be 3


def attainable_rates(n: int) -> list[float]:
    """The rates j / (n + 1) that a bank of n scores without ties can give."""
    return [j / (n + 1) for j in range(n + 2)]


@dataclass(frozen=True)
class Budget:
    """B takeovers of m chains, as the paper asks for them. It only sets the rate, B / m: no hard cap."""

    takeovers: int
    chains: int

    def __post_init__(self) -> None:
        check_count("takeovers", self.takeovers, least=0)
        check_count("chains", self.chains, least=1)

    @property
    def takeover_rate(self) -> float:
        """B / m."""
        return self.takeovers / self.chains


def band(law: Floats) -> tuple[int, int]:
    """The 5 % and 95 % points of a law of counts, P(count) for 0, 1, ..."""
    low, high = (int(count) for count in np.searchsorted(law.cumsum(), (0.05, 0.95)))
    return low, high


def total_law(laws: Sequence[tuple[Floats, int]]) -> Floats:
    """The law of the sum of independent counts: for each law, P(count) for 0, 1, ..., how many have it."""
    if len(laws) == 1 and laws[0][1] == 1:
        return laws[0][0]
    size = 1 + sum(copies * (len(law) - 1) for law, copies in laws)
    spectrum = np.ones(size // 2 + 1, dtype=np.complex128)
    for law, copies in laws:
        spectrum *= np.fft.rfft(law, size) ** copies
    return np.fft.irfft(spectrum, size).clip(0)


def beta_binomial(trials: int, a: int, b: int) -> Floats:
    """P(count) for counts 0 .. trials whose rate is Beta(a, b), float64 [trials + 1]; a = 0 or b = 0 is a sure rate."""
    if a == 0 or b == 0:
        sure = np.zeros(trials + 1)
        sure[0 if a == 0 else -1] = 1.0
        return sure
    log = math.lgamma
    counts = range(trials + 1)
    ways = [log(trials + 1) - log(j + 1) - log(trials - j + 1) for j in counts]
    logs = [w + log(j + a) + log(trials - j + b) for w, j in zip(ways, counts, strict=True)]
    norm = log(a) + log(b) - log(a + b) + log(trials + a + b)
    return np.exp(np.asarray(logs) - norm)
