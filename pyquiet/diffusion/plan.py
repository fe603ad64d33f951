"""When positions are revealed, where that does not depend on the network (arXiv 2406.07524).

A step from time t to s opens each masked position with probability (alpha(s) - alpha(t)) / (1 - alpha(t)), whatever the
tokens are. So the step in which a position opens can be drawn before any call of the network, from one uniform.

Letters: B texts, T columns, K steps, b texts that take part in a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyquiet.diffusion.inputs import Texts
from pyquiet.diffusion.schedule import Schedule
from pyquiet.randomness import Purpose, Stream, uniforms


@dataclass(frozen=True)
class Turn:
    """A step of b texts: its number, their times float64 [b] at its start, rows int64 [b], and what opens [b, T]."""

    step: int
    time: Tensor
    rows: Tensor
    opened: Tensor


@dataclass(frozen=True)
class Plan:
    """The steps of B texts.

    Attributes:
        reveal_step: int64 [B, T], the number of the step that opens each position; -1: none does.
        times: float64 [B, steps] or [1, steps], the times at which steps begin.
        everywhere: all texts with anything to fill take part in all steps, not only in those that open something.
    """

    reveal_step: Tensor
    times: Tensor
    everywhere: bool = False

    def turns(self, first: int = 0) -> Iterator[Turn]:
        """The steps in which any text takes part; the first of all steps has the number `first`."""
        filled = (self.reveal_step >= 0).any(1)
        numbers = self.reveal_step.unique().tolist() if not self.everywhere else range(self.times.shape[1])
        for number in numbers:
            opened = self.reveal_step == number
            rows = (filled if self.everywhere else opened.any(1)).nonzero().flatten()
            if number >= 0 and len(rows):
                times = self.times[:, number].expand(len(filled))
                yield Turn(first + number, times[rows], rows, opened[rows])

    def __len__(self) -> int:
        """The number of steps in which any text takes part."""
        if self.everywhere:
            return self.times.shape[1] if bool((self.reveal_step >= 0).any()) else 0
        return len(self.reveal_step[self.reveal_step >= 0].unique())


def schedule_first(texts: Texts, schedule: Schedule, steps: int, seed: int) -> Plan:
    """The plan of K steps whose positions draw their step from one uniform each."""
    grid = schedule.grid(steps)
    # A position has been opened by time s with probability (alpha(s) - alpha(1)) / (1 - alpha(1)).
    number = torch.searchsorted(schedule.alpha(grid), _clean_shares(texts, schedule, seed), right=True) - 1
    return Plan(number.clamp(0, steps - 1).masked_fill(~texts.fill, -1), grid[None, :-1])


def ancestral(texts: Texts, schedule: Schedule, steps: int, seed: int) -> Plan:
    """The plan of K steps, each of which draws for every masked position whether it opens."""
    grid = schedule.grid(steps)
    masked, number = texts.fill.clone(), torch.full(texts.fill.shape, -1)
    for step, chance in enumerate(schedule.reveal(grid[:-1], grid[1:]).tolist()):
        opened = masked.clone()
        if step < steps - 1:  # the last one opens what is left
            opened[masked] = reveal_uniforms(texts, masked, seed, step) < chance
        number[opened] = step
        masked &= ~opened
    return Plan(number, grid[None, :-1], everywhere=True)


def first_hitting(texts: Texts, schedule: Schedule, seed: int) -> Plan:
    """The limit of infinitely many steps: a step for each position, at the time at which it opens.

    The times are independent, so the next one after t is that of the largest of n: t U^(1 / n) where alpha = 1 - t, and
    of a position chosen uniformly.
    """
    shares = _clean_shares(texts, schedule, seed).masked_fill(~texts.fill, torch.inf)
    ordered, order = shares.sort(dim=1, stable=True)
    number = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    # Of positions that are never opened the time means nothing.
    return Plan(number.masked_fill(~texts.fill, -1), schedule.time(ordered.clamp(max=1)))


def _clean_shares(texts: Texts, schedule: Schedule, seed: int) -> Tensor:
    """alpha at the time at which each position opens, float64 [B, T]; 1 where it is not to be filled."""
    shares = torch.ones(texts.fill.shape, dtype=torch.float64)
    start = schedule.alpha(torch.ones((), dtype=torch.float64))
    shares[texts.fill] = start + (1 - start) * reveal_uniforms(texts, texts.fill, seed)
    return shares


def reveal_uniforms(texts: Texts, where: Tensor, seed: int, step: int | None = None) -> Tensor:
    """The numbers that decide when positions open, or, with a step, whether they do in it; other ones.

    float64 [n], one for each of n positions, `where` bool [B, T].
    """
    row = where.nonzero()[:, 0]
    address = texts.sequences[row], texts.places[where], step or 0, int(step is not None)
    return uniforms(Stream(seed, Purpose.REVEAL, *address), len(row))
