"""The two-stream engine against transformers' XLNet, which recomputes everything."""

import pytest
import torch

from pyquiet.any_subset import as_engine, order_from_mask
from pyquiet.any_subset.modeling import XLNetEngine
from pyquiet.any_subset.order import ranks_of

from .models import random_xlnet, transformers_logits

N, V = 9, 11
RAGGED_KNOWN = torch.tensor(
    [[1, 0, 0, 1, 0, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1, 1, 0, 1]], dtype=torch.bool
)


@pytest.fixture(scope="module")
def model():
    return random_xlnet(V)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, V, (3, N), generator=torch.Generator().manual_seed(1))


def expected(model, tokens, order, prompt, ranks, sees):
    rows = [
        transformers_logits(model, tokens[b], order[b], int(prompt[b]), int(order[b, r]), int(s))
        for b in range(len(tokens))
        for r, s in zip(ranks[b], sees[b], strict=True)
    ]
    return torch.stack(rows).unflatten(0, ranks.shape)


@torch.no_grad()
def test_density_of_a_ragged_batch_in_one_call(model, tokens):
    order, prompt = order_from_mask(RAGGED_KNOWN)
    engine = as_engine(model)
    ranks = torch.stack([torch.arange(m, m + 2) for m in prompt])
    got = engine.head(engine.density(engine.start(order, prompt), tokens, ranks))
    torch.testing.assert_close(got, expected(model, tokens, order, prompt, ranks, ranks), rtol=0, atol=1e-5)


@torch.no_grad()
def test_drafts_of_a_ragged_batch(model, tokens):
    order, prompt = order_from_mask(RAGGED_KNOWN)
    engine = as_engine(model)
    ranks = torch.stack([torch.arange(m, m + 2) for m in prompt])
    got = engine.head(engine.draft(engine.start(order, prompt), tokens, prompt, ranks))
    sees = prompt[:, None].expand_as(ranks)
    torch.testing.assert_close(got, expected(model, tokens, order, prompt, ranks, sees), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_whole_pass_equals_the_cached_calls(model, tokens):
    model = random_xlnet(V).double()
    known = RAGGED_KNOWN.clone()
    known[1] = False  # an empty prompt
    order, prompt = order_from_mask(known)
    engine = XLNetEngine(model)
    by_position = ranks_of(order)
    everything = torch.arange(N).expand(3, N)
    density, draft = by_position, torch.minimum(by_position, prompt[:, None])
    whole = engine.head(engine.whole(tokens, order, prompt, torch.stack([density, draft], 1)))
    cache = engine.start(order, prompt)
    drafted = engine.head(engine.draft(cache, tokens, prompt, everything))
    targets = everything >= prompt[:, None]
    got = whole[:, 1].gather(1, order[..., None].expand(-1, -1, V))
    torch.testing.assert_close(got[targets], drafted[targets], rtol=0, atol=1e-11)
    got = whole[:, 0].gather(1, order[..., None].expand(-1, -1, V))
    for rank in range(N):  # one rank at a time, idle where the rank is given
        ranks = torch.where(rank >= prompt, rank, -1)[:, None]
        step = engine.head(engine.density(cache, tokens, ranks))[:, 0]
        live = ranks[:, 0] >= 0
        torch.testing.assert_close(step[live], got[live, rank], rtol=0, atol=1e-11)


@torch.no_grad()
def test_a_draft_that_is_not_committed_leaves_nothing_behind(model, tokens):
    order, prompt = order_from_mask(RAGGED_KNOWN)
    engine = as_engine(model)
    ranks = prompt[:, None] + 1
    cache, other = engine.start(order, prompt), tokens.clone()
    other.scatter_(1, order.gather(1, ranks - 1), (tokens.gather(1, order.gather(1, ranks - 1)) + 1) % V)
    wrong = engine.density(cache, other, ranks)
    cache.commit(prompt)
    engine.density(cache, other, ranks)
    cache.commit(prompt)
    again = engine.density(cache, tokens, ranks)
    alone = engine.density(engine.start(order, prompt), tokens, ranks)
    torch.testing.assert_close(again, alone, rtol=0, atol=1e-6)
    assert (wrong - alone).abs().amax() > 1e-2


@torch.no_grad()
def test_hidden_tokens_are_never_looked_at(model, tokens):
    order, prompt = order_from_mask(RAGGED_KNOWN)
    engine = as_engine(model)
    ranks = prompt[:, None] + torch.arange(2)
    changed = torch.where(RAGGED_KNOWN, tokens, (tokens + 3) % V)
    before = engine.draft(engine.start(order, prompt), tokens, prompt, ranks)
    assert torch.equal(before, engine.draft(engine.start(order, prompt), changed, prompt, ranks))


@torch.no_grad()
def test_an_empty_prompt_gives_the_first_rank_nothing(model, tokens):
    order, prompt = order_from_mask(torch.zeros(3, N, dtype=torch.bool))
    engine = as_engine(model)
    first = engine.density(engine.start(order, prompt), tokens, torch.zeros(3, 1, dtype=torch.int64))
    assert first.isfinite().all()
    changed = (tokens + 1) % V
    assert torch.equal(
        first, engine.density(engine.start(order, prompt), changed, torch.zeros(3, 1, dtype=torch.int64))
    )


@torch.no_grad()
def test_dropping_finished_sequences_keeps_the_rest(model, tokens):
    order, prompt = order_from_mask(RAGGED_KNOWN)
    engine = as_engine(model)
    cache = engine.prefill(tokens, order, prompt)
    ranks = prompt[:, None] + torch.arange(2)
    rest = torch.tensor([2, 0])
    every = engine.draft(cache, tokens, prompt, ranks)
    cache.select(rest)
    some = engine.draft(cache, tokens[rest], prompt[rest], ranks[rest])
    torch.testing.assert_close(some, every[rest], rtol=0, atol=1e-6)


def test_models_that_cannot_fill_in_any_order_are_refused():
    with pytest.raises(TypeError, match="XLNetLMHeadModel"):
        as_engine(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="attn_type"):
        as_engine(random_xlnet(V, attn_type="uni"))
