"""When positions open, and how often the network is called for it; what they become is tested in test_exactness.py."""

import math

import pytest
import torch

from pyquiet.diffusion import plan as plans
from pyquiet.diffusion.inputs import Texts
from pyquiet.diffusion.schedule import KINDS, Schedule
from pyquiet.testing import goodness_of_fit

K, T, B = 6, 5, 4000


def texts(B=B, T=T, fill=None, real=None, sequences=None):
    fill = torch.ones(B, T, dtype=torch.bool) if fill is None else fill
    real = torch.ones_like(fill) if real is None else real
    ids = torch.arange(len(fill)) if sequences is None else sequences
    places = (real.cumsum(1) - 1).clamp(min=0)
    return Texts(torch.zeros(fill.shape, dtype=torch.int64), fill & real, real, places, ids)


def shares(schedule, steps):
    """The probability of each step to open a position that is masked at time 1, [K]."""
    alpha = schedule.alpha(schedule.grid(steps))
    return alpha.diff() / (1 - alpha[0])


@pytest.mark.parametrize("schedule", [*(Schedule(kind) for kind in KINDS), Schedule(eps=0.3)], ids=str)
@pytest.mark.parametrize("draw", [plans.schedule_first, plans.ancestral])
def test_each_position_opens_by_itself_as_the_schedule_says(schedule, draw):
    number = draw(texts(), schedule, K, 1).reveal_step
    law = shares(schedule, K)
    counts = torch.bincount(number.flatten(), minlength=K)
    assert goodness_of_fit(counts, law).p_value > 1e-4
    pairs = torch.bincount((number[:, :-1] * K + number[:, 1:]).flatten()[::2], minlength=K * K)
    assert goodness_of_fit(pairs, torch.outer(law, law).flatten()).p_value > 1e-4
    wrong = law + 0.02 * torch.arange(K)
    assert goodness_of_fit(counts, wrong / wrong.sum()).p_value < 1e-6


def test_the_two_draw_from_different_numbers():
    first, second = (draw(texts(), Schedule(), K, 1).reveal_step for draw in (plans.schedule_first, plans.ancestral))
    together = torch.bincount((first * K + second).flatten(), minlength=K * K)
    law = shares(Schedule(), K)
    assert goodness_of_fit(together, torch.outer(law, law).flatten()).p_value > 1e-4


@pytest.mark.parametrize(("steps", "length"), [(1, 4), (10, 3), (64, 64), (16, 256)])
def test_the_number_of_steps_is_the_formula(steps, length):
    many = texts(400, length)
    calls = torch.zeros(400)
    for turn in plans.schedule_first(many, Schedule(), steps, 3).turns():
        assert turn.opened.any(1).all()
        calls[turn.rows] += 1
    expected = steps * (1 - (1 - 1 / steps) ** length)
    assert abs(float(calls.mean()) - expected) <= 3 * float(calls.std()) / math.sqrt(400) + 1e-4
    assert (calls <= min(steps, length)).all()


def test_turns_are_the_steps_in_which_a_text_takes_part():
    fill = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    plan = plans.schedule_first(texts(fill=fill, T=3), Schedule("cosine"), 4, 5)
    grid = Schedule("cosine").grid(4)
    seen = torch.full((3, 3), -1)
    turns = list(plan.turns(first=10))
    assert len(turns) == len(plan)
    for turn in turns:
        assert (turn.time == grid[turn.step - 10]).all()
        seen[turn.rows] = torch.where(turn.opened, turn.step - 10, seen[turn.rows])
    assert torch.equal(seen, plan.reveal_step)
    assert ((seen >= 0) == fill).all()
    everywhere = plans.ancestral(texts(fill=fill, T=3), Schedule(), 4, 5)
    assert [turn.rows.tolist() for turn in everywhere.turns()] == [[0, 2]] * 4 == [[0, 2]] * len(everywhere)


def test_nothing_to_fill_is_no_step():
    none = texts(fill=torch.zeros(2, 3, dtype=torch.bool))
    for plan in (
        plans.schedule_first(none, Schedule(), 4, 0),
        plans.ancestral(none, Schedule(), 4, 0),
        plans.first_hitting(none, Schedule(), 0),
    ):
        assert list(plan.turns()) == []
        assert len(plan) == 0


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("cosine"), Schedule(eps=0.2)], ids=str)
def test_first_hitting_opens_one_position_at_a_time_when_it_would_open(schedule):
    plan = plans.first_hitting(texts(), schedule, 2)
    assert torch.equal(plan.reveal_step.sort(1).values, torch.arange(T).expand(B, T))
    assert (plan.times.diff(dim=1) <= 0).all()
    # All orders are equally likely.
    code = (plan.reveal_step * T ** torch.arange(T)).sum(1)
    counts = torch.bincount(code.unique(return_inverse=True)[1])
    assert len(counts) == math.factorial(T)
    assert goodness_of_fit(counts, torch.full((len(counts),), 1 / len(counts))).p_value > 1e-4
    # The share that is masked at the n-th time is the n-th of T uniforms: u^(1 / n) of the one before.
    alpha = (schedule.alpha(plan.times) - schedule.eps) / (1 - schedule.eps)
    masked = torch.cat([torch.ones(B, 1), 1 - alpha], 1)
    for n in range(T):
        u = (masked[:, n + 1] / masked[:, n]) ** (T - n)
        counts = torch.histc(u.float(), 10, 0, 1).long()
        assert goodness_of_fit(counts, torch.full((10,), 0.1)).p_value > 1e-4
        wrong = torch.histc(((masked[:, n + 1] / masked[:, n]) ** (T - n + 1)).float(), 10, 0, 1).long()
        assert goodness_of_fit(wrong, torch.full((10,), 0.1)).p_value < 1e-6


def test_first_hitting_is_the_limit_of_many_steps():
    """The same numbers decide, so with many steps the order and, to a step, the times are the same."""
    some = texts(50)
    many, limit = plans.schedule_first(some, Schedule(), 10**6, 2), plans.first_hitting(some, Schedule(), 2)
    assert torch.equal(many.reveal_step.argsort(1), limit.reveal_step.argsort(1))
    times = many.times[0, many.reveal_step.sort(1).values]
    torch.testing.assert_close(times, limit.times, rtol=0, atol=2e-6)


DRAWS = [
    lambda some: plans.schedule_first(some, Schedule(), K, 9),
    lambda some: plans.ancestral(some, Schedule(), K, 9),
    lambda some: plans.first_hitting(some, Schedule(), 9),
]


@pytest.mark.parametrize("draw", DRAWS, ids=["schedule_first", "ancestral", "first_hitting"])
def test_a_plan_depends_on_ids_and_places_alone(draw):
    generator = torch.Generator().manual_seed(0)
    fill = torch.rand(8, T, generator=generator) < 0.7
    ids = torch.tensor([5, 3, 900, 2**32 - 1, 0, 7, 8, 9])
    whole = draw(texts(fill=fill, sequences=ids)).reveal_step
    order = torch.randperm(8, generator=generator)
    assert torch.equal(draw(texts(fill=fill[order], sequences=ids[order])).reveal_step, whole[order])
    assert torch.equal(draw(texts(fill=fill[2:3], sequences=ids[2:3])).reveal_step, whole[2:3])
    padded = torch.nn.functional.pad(fill, (3, 2))  # padding on both sides
    real = torch.nn.functional.pad(torch.ones_like(fill), (3, 2))
    assert torch.equal(draw(texts(fill=padded, real=real, sequences=ids)).reveal_step[:, 3:-2], whole)
    assert not torch.equal(draw(texts(fill=fill)).reveal_step, whole)
