"""The choice of rounds, on a simulated clock."""

import pytest
import torch

from pyquiet.any_subset.cost import SEQUENTIAL, CostModel, Plan

PLANS = [Plan("assd", 3), Plan("assd", 5), Plan("one_call", 1), Plan("one_call", 3)]


def simulate(price, acceptance, tokens, costs=None, seed=0):
    """Seconds, by kinds of rounds, of filling `tokens` where a round costs price(plan) and drafts are kept so."""
    costs, generator = costs or CostModel(), torch.Generator().manual_seed(seed)
    spent, done, used = 0.0, 0, {}
    while done < tokens:
        plan = costs.choose(PLANS)
        seconds = price(plan) * (1 + 0.1 * torch.rand(1, generator=generator).item())
        certain = {"sequential": 0, "assd": 1, "one_call": 0}[plan.kind]
        tried = 0 if plan == SEQUENTIAL else plan.k
        kept = 0
        while kept < tried and (kept < certain or torch.rand(1, generator=generator) < acceptance(kept + 1 - certain)):
            kept += 1
        decided = min(kept + 1, tokens - done)
        costs.observe(plan, seconds, decided, torch.tensor([tried]), torch.tensor([kept]))
        spent, done = spent + seconds, done + decided
        used[plan] = used.get(plan, 0) + decided
    return spent, used, costs


def cheap(plan):
    return 1.0 if plan == SEQUENTIAL else 1.3 + 0.05 * plan.k


def dear(plan):
    return 1.0 if plan == SEQUENTIAL else 3.0 + plan.k


@pytest.mark.parametrize("tokens", [10, 100, 1000])
@pytest.mark.parametrize("acceptance", [lambda d: 0.0, lambda d: 0.3])
def test_never_much_slower_than_sequential(tokens, acceptance):
    spent = sum(simulate(dear, acceptance, tokens, seed=s)[0] for s in range(5)) / 5
    assert spent < 1.05 * 1.05 * tokens  # the clock's own noise is 5 % on average


@pytest.mark.parametrize("acceptance", [lambda d: 0.9, lambda d: 0.5])
def test_what_pays_is_found_and_kept(acceptance):
    spent, used, costs = simulate(cheap, acceptance, 2000)
    rates = {plan: costs.tokens(plan) / cheap(plan) for plan in PLANS}
    best = max(PLANS, key=rates.__getitem__)
    assert rates[best] > 1.2
    assert sum(used.get(plan, 0) for plan in PLANS if rates[plan] > 0.95 * rates[best]) > 1000
    again, _, _ = simulate(cheap, acceptance, 100, costs)  # what was learned serves the next text
    assert again < 1.15 * 1.05 * 100 * cheap(best) / costs.tokens(best)
    assert spent < 2000


def test_a_text_that_is_harder_than_those_before_is_noticed():
    costs = CostModel()
    simulate(lambda plan: 1.0 if plan == SEQUENTIAL else 2 + 0.2 * plan.k, lambda d: 0.95, 3000, costs)
    spent, _, _ = simulate(lambda plan: 1.0 if plan == SEQUENTIAL else 2 + 0.2 * plan.k, lambda d: 0.05, 400, costs)
    assert spent < 1.06 * 1.05 * 400


def test_expected_tokens_are_the_sums_of_the_theorem():
    costs = CostModel()
    for _ in range(400):  # a draft that misses d tokens is kept with probability 1/2, whatever d
        tried, kept = torch.tensor([4, 4, 4, 4, 4, 4, 4, 4]), torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
        costs.observe(Plan("one_call", 4), 1.0, 1.0, tried, kept)
    assert costs.tokens(Plan("one_call", 3)) == pytest.approx(1 + 1 / 2 + 1 / 4 + 1 / 8, rel=0.02)
    assert costs.tokens(Plan("assd", 4)) == pytest.approx(2 + 1 / 2 + 1 / 4 + 1 / 8, rel=0.02)
    assert costs.tokens(SEQUENTIAL) == 1
    costs.bonus = False  # the last draft then opens no further token
    assert costs.tokens(Plan("assd", 4)) == pytest.approx(2 + 1 / 2 + 1 / 4, rel=0.02)
