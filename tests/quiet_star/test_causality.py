"""A thought depends on the text up to its token and its own path; else on nothing, bit for bit."""

from __future__ import annotations

import pytest
import torch

from .thinkers import other, padded, random_ids, thinker

MODELS = ["llama", "mistral", "gpt2", "gemma2"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@torch.no_grad()
def test_a_later_token_changes_nothing_before_it(name, dtype):
    model, ids = thinker(name, m=3, dtype=dtype), random_ids(2, 8)
    options = {"seed": 6, "thoughts_per_token": 2}
    before = model.think_at_every_token(ids, **options)
    logits = model(ids, think="always", **options).logits
    for j in (1, 4, 7):
        changed = ids.clone()
        changed[:, j] = other(ids[:, j])
        after = model.think_at_every_token(changed, **options)
        for field in ("tokens", "log_probs", "weight"):
            old, new = getattr(before, field), getattr(after, field)
            assert torch.equal(new[:, :j], old[:, :j])
            assert not torch.equal(new[:, j:], old[:, j:])
        for field in ("mixed_log_probs", "base_log_probs"):
            old, new = getattr(before, field), getattr(after, field)
            assert torch.equal(new[:, : j - 1], old[:, : j - 1])
            assert not torch.equal(new[:, j - 1], old[:, j - 1])
        assert torch.equal(model(changed, think="always", **options).logits[:, :j], logits[:, :j])


@torch.no_grad()
def test_thoughts_are_never_seen_by_the_text():
    model, ids = thinker(m=3), random_ids(2, 8)
    one = model.think_at_every_token(ids, seed=1)
    two = model.think_at_every_token(ids, seed=2)
    assert not torch.equal(one.tokens, two.tokens)
    assert torch.equal(one.base_log_probs, two.base_log_probs)


@torch.no_grad()
def test_a_row_does_not_see_the_other_rows():
    model, ids = thinker(m=3), random_ids(3, 6)
    before = model.think_at_every_token(ids, seed=1)
    changed = ids.clone()
    changed[1] = other(ids[1])
    after = model.think_at_every_token(changed, seed=1)
    for field in ("tokens", "log_probs", "weight", "mixed_log_probs", "base_log_probs"):
        old, new = getattr(before, field), getattr(after, field)
        assert torch.equal(new[[0, 2]], old[[0, 2]])
        assert not torch.equal(new[1], old[1])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_what_stands_at_padding_is_not_read(side):
    model = thinker("mistral", m=2)
    ids, mask = padded([random_ids(1, 6)[0], random_ids(1, 3)[0]], side)
    before = model.think_at_every_token(ids, mask, seed=1)
    after = model.think_at_every_token(ids.masked_fill(mask == 0, 55), mask, seed=1)
    for field in ("tokens", "log_probs", "weight", "mixed_log_probs", "base_log_probs"):
        assert torch.equal(getattr(after, field), getattr(before, field))


@pytest.mark.parametrize("which", ["start_embedding", "end_embedding"])
@torch.no_grad()
def test_start_and_end_stand_where_they_should(which):
    """START changes the thought; END comes after it and changes only the weight and the mix."""
    model, ids = thinker(m=3), random_ids(2, 6)
    before = model.think_at_every_token(ids, seed=1)
    getattr(model, which).add_(0.01)
    after = model.think_at_every_token(ids, seed=1)
    assert torch.equal(after.log_probs, before.log_probs) == (which == "end_embedding")
    assert not torch.equal(after.weight, before.weight)
    assert torch.equal(after.base_log_probs, before.base_log_probs)
