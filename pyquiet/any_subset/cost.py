"""Choosing a round by its price: tokens that it is expected to decide over the seconds that it takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SLACK = 0.03  # of the time so far, to be lost on trials
_MEMORY = 0.9  # of a running mean, a round
_FORGET = 0.995  # of what is known of acceptance, a round
_FIRST_PRICE = 3  # plus k: assumed of a round never seen, in sequential ones


@dataclass(frozen=True)
class Plan:
    """A kind of round: "sequential", "assd" or "one_call", and its number of drafts."""

    kind: str
    k: int


SEQUENTIAL = Plan("sequential", 1)


class CostModel:
    """Running means of what rounds cost and of how often drafts are kept, by how many tokens they were drafted without.

    A draft that misses d undecided tokens is kept with probability a_d given that those before it were; ASSD's draft j
    misses j and its first none, a one-call round's draft j misses j + 1. So ASSD with a bonus decides 2 + A_1 + .. +
    A_(k-1) tokens a round and the one-call round 1 + A_1 + .. + A_k, with A_j = a_1 .. a_j. A round is chosen where its
    tokens a second are the most; others are tried only while what trials have lost against it is below 3 % of the time.
    """

    def __init__(self) -> None:
        self.seconds: dict[Plan, float] = {}
        self.tried = torch.zeros(0, dtype=torch.float64)
        self.kept = torch.zeros(0, dtype=torch.float64)
        self.elapsed = self.lost = 0.0
        self._turn = 0
        self._trial_of: float | None = None  # tokens a second of what a trial stands in for

    def choose(self, plans: list[Plan]) -> Plan:
        """One of the plans, or the sequential round."""
        self._trial_of = None
        if SEQUENTIAL not in self.seconds:
            return SEQUENTIAL
        best = max([SEQUENTIAL, *(p for p in plans if p in self.seconds)], key=self.tokens_per_second)
        unseen = [p for p in plans if p not in self.seconds]
        others = unseen or [p for p in (SEQUENTIAL, *plans) if p != best]
        self._turn += 1
        trial, rate = others[self._turn % len(others)] if others else best, self.tokens_per_second(best)
        price = self.seconds.get(trial, (_FIRST_PRICE + trial.k) * self.seconds[SEQUENTIAL])
        if trial != best and self.lost + price - self.tokens(trial) / rate < _SLACK * self.elapsed:
            self._trial_of = rate
            return trial
        return best

    def observe(self, plan: Plan, seconds: float, decided: float, tried: Tensor, kept: Tensor) -> None:
        """A round's seconds, the tokens that it decided a sequence, and the drafts tried and kept, int64 [b] each."""
        old = self.seconds.get(plan)
        # What a round once took is never exceeded twice as far by the work: such a pause is the machine's.
        mean = seconds if old is None else _MEMORY * old + (1 - _MEMORY) * min(seconds, 2 * old)
        self.seconds[plan] = mean
        self.charge(seconds, decided)
        if plan != SEQUENTIAL:
            self._count(tried, kept, first=1 if plan.kind == "assd" else 0)

    def charge(self, seconds: float, decided: float) -> None:
        """Count a round's time without learning its price from it: one that had a prompt to read, say."""
        self.elapsed += seconds
        if self._trial_of is not None:
            self.lost = max(0.0, self.lost + seconds - decided / self._trial_of)

    def tokens(self, plan: Plan) -> float:
        """Expected tokens of a round."""
        if plan == SEQUENTIAL:
            return 1.0
        drafts = plan.k - 1 if plan.kind == "assd" else plan.k
        together = self._acceptance(drafts).cumprod(0).sum().item()
        return (2.0 if plan.kind == "assd" else 1.0) + together

    def tokens_per_second(self, plan: Plan) -> float:
        return self.tokens(plan) / self.seconds[plan]

    def _acceptance(self, drafts: int) -> Tensor:
        missing = drafts - len(self.tried)
        tried, kept = (torch.nn.functional.pad(x, (0, max(0, missing)))[:drafts] for x in (self.tried, self.kept))
        return (kept + 1) / (tried + 2)

    def _count(self, tried: Tensor, kept: Tensor, first: int) -> None:
        """Draft number j, from 0, was tried where j <= kept and j < tried; the first of ASSD's says nothing."""
        width = int(tried.max()) if tried.numel() else 0
        number = torch.arange(first, max(first, width))
        reached = ((number <= kept[:, None]) & (number < tried[:, None])).sum(0).double()
        stood = (number < kept[:, None]).sum(0).double()
        grow = max(0, len(number) - len(self.tried))
        self.tried, self.kept = (torch.nn.functional.pad(_FORGET * x, (0, grow)) for x in (self.tried, self.kept))
        self.tried[: len(number)] += reached
        self.kept[: len(number)] += stood
