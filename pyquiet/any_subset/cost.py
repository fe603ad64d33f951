"""Choosing a round by its price: tokens that it is expected to decide over the seconds that it takes."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from operator import mul
from statistics import median

import torch
from torch import Tensor

_SLACK = 0.025  # of the time of late, that may be lost against sequential rounds
_HORIZON = 0.995  # of that time, a round: the time that counts is that of some 200 rounds
_ADVANTAGE = 1.03  # tokens a second, over sequential rounds, that are worth a change
_CLOSE = 0.85  # of the best rate: what is so fast may be the best in truth, and is looked at again
_REFRESH = 16  # rounds between two looks at sequential rounds, and at another kind
_WINDOW, _ENOUGH = 9, 3  # seconds of a kind of round that are remembered, and that must be seen to judge it
_FORGET = 0.98  # of what is known of acceptance, a round
_FIRST_PRICE = 2  # plus k: assumed of a round never seen, in sequential ones


@dataclass(frozen=True)
class Plan:
    """A kind of round: "sequential", "assd", "one_call", "ngram" or "drafter", and its number of drafts."""

    kind: str
    k: int


SEQUENTIAL = Plan("sequential", 1)


class CostModel:
    """What rounds cost of late, and how often drafts are kept, by how many tokens they were drafted without.

    A draft that misses d undecided tokens is kept with probability a_d given that those before it were; ASSD's draft j
    misses j and its first none, a one-call round's draft j misses j + 1. So ASSD with a bonus decides 2 + A_1 + .. +
    A_(k-1) tokens a round and the one-call round 1 + A_1 + .. + A_k, with A_j = a_1 .. a_j.

    The kind of the most tokens a second is chosen. Sequential rounds are measured again and again, and what the others
    have lost against them is kept below 2.5 % of the time: above it, there are only sequential rounds until it has worn
    off. Seconds are medians, since a pause of the machine says nothing about a kind of round.
    """

    def __init__(self, bonus: bool = True) -> None:
        self.bonus = bonus  # of ASSD
        self.seconds: defaultdict[Plan, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))
        # By a draft's number. No tensors: all plans are judged every round, which itself may take but a millisecond.
        self.tried: list[float] = []
        self.kept: list[float] = []
        self.elapsed = self.lost = 0.0
        self._turn = 0

    def choose(self, plans: list[Plan]) -> Plan:
        """One of the plans, or the sequential round."""
        self._turn += 1
        allowed = _SLACK * self.elapsed
        if len(self.seconds[SEQUENTIAL]) < _ENOUGH or self._turn % _REFRESH == 0 or self.lost > allowed:
            return SEQUENTIAL
        judged = [plan for plan in plans if len(self.seconds[plan]) >= _ENOUGH]
        rates = {plan: self.tokens(plan) / median(self.seconds[plan]) for plan in judged}
        rates[SEQUENTIAL] = _ADVANTAGE / median(self.seconds[SEQUENTIAL])
        best = max(rates, key=rates.__getitem__)
        others = [plan for plan in plans if plan not in rates]
        if not others and self._turn % _REFRESH == _REFRESH // 2:
            others = [plan for plan in judged if plan != best and rates[plan] > _CLOSE * rates[best]]
        if others:
            trial = others[self._turn // _REFRESH % len(others)]
            if self.lost + self._loss(trial) < allowed:
                return trial
        return best

    def observe(self, plan: Plan, seconds: float, decided: float, tried: Tensor, kept: Tensor) -> None:
        """A round's seconds, the tokens that it decided a sequence, and the drafts tried and kept, int64 [b] each."""
        self.seconds[plan].append(seconds)
        self.charge(plan, seconds, decided)
        if plan != SEQUENTIAL:
            self._count(tried, kept, first=1 if plan.kind == "assd" else 0)

    def charge(self, plan: Plan, seconds: float, decided: float) -> None:
        """Count a round's time without learning its price from it: one that had a prompt to read, say."""
        self.elapsed = _HORIZON * self.elapsed + seconds
        self.lost *= _HORIZON
        if plan != SEQUENTIAL and self.seconds[SEQUENTIAL]:
            self.lost = max(0.0, self.lost + seconds - decided * median(self.seconds[SEQUENTIAL]))

    def tokens(self, plan: Plan) -> float:
        """Expected tokens of a round."""
        if plan == SEQUENTIAL:
            return 1.0
        drafts = plan.k - 1 - (not self.bonus) if plan.kind == "assd" else plan.k
        together: float = sum(accumulate(self._acceptance(drafts), mul))
        return (2.0 if plan.kind == "assd" else 1.0) + together

    def _loss(self, plan: Plan) -> float:
        """Seconds that a round of `plan` is expected to take beyond those of as many tokens by sequential rounds."""
        step, seen = median(self.seconds[SEQUENTIAL]), self.seconds[plan]
        return (median(seen) if seen else (_FIRST_PRICE + plan.k) * step) - self.tokens(plan) * step

    def _acceptance(self, drafts: int) -> list[float]:
        seen = [(kept + 1) / (tried + 2) for kept, tried in zip(self.kept[:drafts], self.tried[:drafts], strict=True)]
        return seen + [0.5] * (drafts - len(seen))

    def _count(self, tried: Tensor, kept: Tensor, first: int) -> None:
        """The first of ASSD's drafts, which is exact, says nothing."""
        reached, stood = (counts[first:].tolist() for counts in by_number(tried, kept))
        self.tried, self.kept = (
            [_FORGET * old + new for old, new in zip_longest(known, more, fillvalue=0)]
            for known, more in ((self.tried, reached), (self.kept, stood))
        )


def by_number(tried: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """How often the turn of a round's draft number j came, and how often it was kept, int64 [drafts] each.

    Of the drafts tried and kept in rounds, int64 [b] each: number j's turn came where j <= kept and j < tried.
    """
    number = torch.arange(int(tried.max()) if tried.numel() else 0)
    return ((number <= kept[:, None]) & (number < tried[:, None])).sum(0), (number < kept[:, None]).sum(0)
