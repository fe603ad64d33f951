"""Calibrators: which bank a score is ranked in, and whether the promise holds there (arXiv 2509.15148, section 3)."""

import bisect
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, Protocol

import numpy as np

from pyquiet.checks import check_count, check_word
from pyquiet.scaling.cells import Cell, Members
from pyquiet.scaling.conformal import Bank, ClusteredBank, PValue, check_bank, rank
from pyquiet.scaling.spent import Spent

Base = Literal["pooled", "hierarchical"]
Kind = Literal["pooled", "hierarchical", "per_turn"]
BUCKETS = (0, 1, 2, 4, 8)  # first turns of each: 0, 1, 2-3, 4-7, 8 and later

Scores = Sequence[tuple[float, Cell]]


class Calibrator(Protocol):
    """Gives the p-values of scores.

    If it has an attribute `taxonomy`, what its scores depend on, it is refused where that is not the same. A method
    `keep` of one that learns gives what takes it back to what it knows now, for runs that do not finish.
    """

    @property
    def version(self) -> str:
        """A hash of all that p-values depend on."""

    def p_value(self, score: float, cell: Cell, uniform: float) -> PValue | None:
        """The score's p-values; None where there are too few scores to rank it in."""

    def observe(self, score: float, cell: Cell, took_over: bool) -> None:
        """Sees a decided score, after its own decision."""

    def advance(self) -> None:
        """A batch of questions has ended."""

    def rate(self, takeover_rate: float) -> float:
        """The rate to decide by now."""


class Ours:
    """A calibrator of this package.

    Attributes:
        taxonomy: what its scores depend on (models, template, ...), by name; empty where nobody has told.
        spent: what `ATTS.calibrate` took to make it, None where nobody has told.
    """

    taxonomy: Mapping[str, str] = MappingProxyType({})
    spent: Spent | None = None

    def keep(self) -> Callable[[], None]:
        """What takes it back to what it knows now."""
        return lambda: None


class _Still(Ours):
    """A calibrator that learns nothing from what it decides."""

    def observe(self, score: float, cell: Cell, took_over: bool) -> None: ...
    def advance(self) -> None: ...

    def rate(self, takeover_rate: float) -> float:
        return takeover_rate


class Pooled(_Still):
    """One bank of all scores of first chunks, each counting alike: the paper's marginal calibration.

    For the questions that the bank is made of, all of them asked alike, it is exact up to less than 1 / (n + 1); of
    some of them alone the target may take over all chunks, or none. For a new question it promises too much where
    scores of one question are alike: use `Hierarchical`.

    Args:
        bank: scores of turn 0 (`fit` takes them out of a list). n_min: fewer are no bank.
    """

    def __init__(self, bank: Bank, *, n_min: int = 1) -> None:
        self.bank, self.n_min = bank, check_count("n_min", n_min, least=1)
        self._members = Members([bank])

    @property
    def sizes(self) -> tuple[int, ...]:
        """What p-values are ranked among: scores, or questions."""
        return (self.bank.size,)

    @property
    def version(self) -> str:
        return self.bank.version

    def p_value(self, score: float, cell: Cell, uniform: float) -> PValue | None:
        if self.bank.size < self.n_min:
            return None
        known = not cell.turn and cell in self._members
        if cell.turn:
            why = "the bank holds first chunks, and this is a later turn"
        elif known:
            why = "first turn of a question that is in the bank, if those of the bank are asked alike"
        else:
            why = "new question: scores of one question in the bank are alike, so its size is less than it looks"
        return rank(self.bank, score, uniform, guaranteed=known, why=why)


class Hierarchical(_Still):
    """One bank of first chunks, see `ClusteredBank`: holds for the first turn of new exchangeable questions.

    New are those whose text is not in the bank. Whether they are like those of the bank nobody can know here; only of
    questions whose group is not in the bank nothing is promised.

    Args:
        bank: scores of turn 0. n_min: of fewer questions there is no bank. chains: of each question, those included
            that have no score; None: the most that have one.
    """

    def __init__(self, bank: Bank, *, n_min: int = 1, chains: int | None = None) -> None:
        self.bank, self.n_min, self.chains = bank, check_count("n_min", n_min, least=1), chains
        self._members, self._clustered = Members([bank]), ClusteredBank(bank, chains)

    @property
    def sizes(self) -> tuple[int, ...]:
        """What p-values are ranked among: questions."""
        return (self._clustered.questions,)

    @property
    def version(self) -> str:
        return _of_chains(self.bank.version, self.chains)

    def p_value(self, score: float, cell: Cell, uniform: float) -> PValue | None:
        if self._clustered.questions < self.n_min:
            return None
        but = "the bank holds first chunks, and this is a later turn" if cell.turn else self._members.why_not(cell)
        why = but or "first turn of a new question, if it is like those of the bank"
        return self._clustered.rank(score, uniform, guaranteed=not but, why=why)


class PerQuestion(_Still):
    """A bank for each question, of first chunks that were drafted for it beforehand: the paper's conditional mode.

    Exact for the first turn of that question. Later turns are ranked in the same bank, without a promise.

    Args:
        banks: those that are filled already, by `Cell.of(question).name`. n_min: fewer scores are no bank.
    """

    def __init__(self, banks: Mapping[str, Bank] | None = None, *, n_min: int = 1) -> None:
        self.banks = {name: check_bank(bank) for name, bank in (banks or {}).items()}
        self.n_min = check_count("n_min", n_min, least=1)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the banks that are filled, each size once."""
        return tuple(sorted({bank.size for bank in self.banks.values() if bank.size >= self.n_min}))

    @property
    def version(self) -> str:
        return hashed(sorted((name, bank.version) for name, bank in self.banks.items()))

    def has_bank(self, cell: Cell) -> bool:
        """Whether the question has its bank."""
        return cell.name in self.banks

    def set(self, question: str, scores: Sequence[float]) -> None:
        """Gives a question, by its name in `banks`, its bank."""
        self.banks[question] = Bank(np.asarray(scores, dtype=np.float64), (question,) * len(scores))

    def keep(self) -> Callable[[], None]:
        return partial(setattr, self, "banks", dict(self.banks))

    def p_value(self, score: float, cell: Cell, uniform: float) -> PValue | None:
        bank = self.banks.get(cell.name)
        if bank is None or bank.size < self.n_min:
            return None
        first = cell.turn == 0
        why = (
            "first turn, ranked among the question's own first chunks" if first else "the bank holds first chunks only"
        )
        return rank(bank, score, uniform, guaranteed=first, why=why)


class PerTurn(_Still):
    """A bank for each bucket of turns (Mondrian), pooled or hierarchical.

    Exact, for a chain of a new question that has got so far, at turns that have a hierarchical bucket of their own, if
    the questions that calibrate a turn calibrate no other and were judged by the banks of the turns before it
    (`ATTS.calibrate` sees to that). The rate is that of all decisions of a turn, of however many chains a question. In
    a bucket of several turns it holds roughly, and for all of them together: their scores differ, and chains that
    calibrate a later one were judged before its own scores were in the bank. A bucket with too few scores backs off to
    the one before it, without a promise.

    Args:
        banks: by the first turn of each bucket. base: how scores of one bank count. n_min: fewer scores (pooled) or
            questions (hierarchical) are no bank. chains: of each question in a bank, those included that did not get so
            far; None: the most that did.
    """

    def __init__(
        self,
        banks: Mapping[int, Bank],
        *,
        base: Base = "hierarchical",
        buckets: Sequence[int] = BUCKETS,
        n_min: int = 1,
        chains: int | None = None,
    ) -> None:
        self.base, self.n_min = check_word("base", base, Base), check_count("n_min", n_min, least=1)
        self.banks, self.buckets, self.chains = dict(banks), tuple(check_buckets(buckets)), chains
        self._members = Members(self.banks.values())
        self._clustered = {turn: ClusteredBank(bank, chains) for turn, bank in self.banks.items()}

    @property
    def version(self) -> str:
        banks = hashed([self.base, *sorted((turn, bank.version) for turn, bank in self.banks.items())])
        return _of_chains(banks, self.chains)

    @property
    def sizes(self) -> tuple[int, ...]:
        """What p-values are ranked among in each bank that is large enough."""
        return tuple(n for n in map(self._size, self.banks) if n >= self.n_min)

    def bucket(self, turn: int) -> int:
        """The first turn of the bucket that a turn falls into."""
        return self.buckets[bisect.bisect_right(self.buckets, turn) - 1]

    def p_value(self, score: float, cell: Cell, uniform: float) -> PValue | None:
        mine = self.bucket(cell.turn)
        used = next((b for b in reversed(self.buckets) if b <= mine and self._size(b) >= self.n_min), None)
        if used is None:
            return None
        place = self.buckets.index(mine)
        alone = place + 1 < len(self.buckets) and self.buckets[place + 1] == mine + 1
        sure = False
        if used != mine:
            why = f"too few scores of this turn: ranked among those of turn {used}"
        elif self.base == "pooled":
            why = "scores of one question in the bank are alike, so its size is less than it looks"
        else:
            but = self._members.why_not(cell) if alone else self._shared(place)
            sure, why = not but, but or f"ranked among scores of turn {mine}, if the question is like those of the bank"
        options: dict[str, Any] = {"guaranteed": sure, "why": why}
        if self.base == "hierarchical":
            return self._clustered[used].rank(score, uniform, **options)
        return rank(self.banks[used], score, uniform, **options)

    def _shared(self, place: int) -> str:
        first, *later = self.buckets[place : place + 2]
        turns = f"turns {first} to {later[0] - 1}" if later else f"turns from {first} on"
        return f"{turns} share a bank: what holds there is no turn's own rate"

    def _size(self, bucket: int) -> int:
        if bucket not in self.banks:
            return 0
        return self._clustered[bucket].questions if self.base == "hierarchical" else self.banks[bucket].size


def keep(calibrator: Calibrator) -> Callable[[], None]:
    """What takes a calibrator back to what it knows now, if it says how."""
    own: Callable[[], Callable[[], None]] = getattr(calibrator, "keep", lambda: lambda: None)
    return own()


def fit(
    kind: Kind,
    scores: Scores,
    *,
    base: Base = "hierarchical",
    buckets: Sequence[int] = BUCKETS,
    n_min: int = 1,
    chains: int | None = None,
) -> Pooled | Hierarchical | PerTurn:
    """The calibrator of that kind made of scores and where each comes from.

    Args:
        chains: of each question in a bank, with a score or without; see `Hierarchical` and `PerTurn`.

    Raises ValueError for another kind, or none of the scores that it needs.
    """
    if check_word("kind", kind, Kind) == "per_turn":
        turns = PerTurn({}, base=base, buckets=buckets, n_min=n_min)
        cells = {turns.bucket(cell.turn) for _, cell in scores}
        banks = {b: _bank([(s, c) for s, c in scores if turns.bucket(c.turn) == b]) for b in cells}
        return PerTurn(banks, base=base, buckets=buckets, n_min=n_min, chains=chains)
    bank = _bank([(score, cell) for score, cell in scores if cell.turn == 0])
    return Pooled(bank, n_min=n_min) if kind == "pooled" else Hierarchical(bank, n_min=n_min, chains=chains)


def check_buckets(buckets: Sequence[int]) -> Sequence[int]:
    """The buckets' first turns, if they begin with 0 and increase."""
    if not buckets or buckets[0] != 0 or any(b <= a for a, b in itertools.pairwise(buckets)):
        raise ValueError(f"buckets must be increasing first turns that begin with 0, got {tuple(buckets)}")
    return buckets


def _bank(scores: Iterable[tuple[float, Cell]]) -> Bank:
    pairs = list(scores)
    if not pairs:
        raise ValueError("scores: there is none of a first turn, which this calibrator is made of")
    return Bank(np.asarray([score for score, _ in pairs]), tuple(cell.name for _, cell in pairs))


def _of_chains(version: str, chains: int | None) -> str:
    return version if chains is None else hashed([version, chains])


def hashed(words: Any) -> str:
    """A hash of plain values."""
    return hashlib.blake2b(repr(words).encode(), digest_size=8).hexdigest()
