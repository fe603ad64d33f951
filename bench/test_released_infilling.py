"""The released procedure, as the benches run it, computes what pyquiet computes."""

import pytest
import torch

import pyquiet
from pyquiet.any_subset import as_engine, order_from_mask

from . import released_infilling
from .models import random_xlnet

N = 24


@pytest.fixture(scope="module")
def problem():
    model = random_xlnet("xlnet-6l-bytes")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # the order of the arg maxima must not hang on the last bits
            parameter.mul_(3.0)
    tokens = torch.randint(0, 256, (N,), generator=generator)
    return model, tokens, torch.rand(N, generator=generator) < 0.3


@torch.no_grad()
def test_its_laws_are_the_engines(problem):
    model, tokens, known = problem
    order, m = order_from_mask(known)
    engine = as_engine(model)
    ranks, prompt = torch.arange(m, m + 4), torch.tensor([m])
    cache = engine.start(order[None], prompt)
    for see, hidden in (
        (m, engine.draft(cache, tokens[None], prompt, ranks[None])),
        (None, engine.density(cache, tokens[None], ranks[None])),
    ):
        theirs = released_infilling.network(model, tokens, order, ranks, m, see)
        torch.testing.assert_close(engine.head(hidden)[0], theirs, rtol=0, atol=2e-4)


def test_its_greedy_text_is_ours(problem):
    model, tokens, known = problem
    order, m = order_from_mask(known)
    theirs, calls = released_infilling.infill(model, tokens, order, m, 5, torch.Generator(), greedy=True)
    ours = pyquiet.infill(model, tokens[None], mask=~known[None], method="assd", k=5, bonus=False, temperature=0)
    assert torch.equal(theirs, ours.tokens[0])
    assert calls == ours.calls["draft"] + ours.calls["density"]
