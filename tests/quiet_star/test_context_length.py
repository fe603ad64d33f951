"""The longest path must fit into the model's context; what does not is refused before any call."""

from __future__ import annotations

import pytest
import torch

from .architectures import CONTEXT
from .thinkers import CallCounter, random_ids, thinker

M = 2
NAMES = ["llama", "gpt2", "opt", "gemma3"]


def longest(name):
    return thinker(name, m=M, dtype=torch.float32, attention="sdpa")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_fits_is_accepted(name):
    """The path after the last of T tokens ends at T + m + 2."""
    model = longest(name)
    text = random_ids(1, CONTEXT - M - 2)
    assert (model.think_at_every_token(text, seed=0).tokens >= 0).all()
    assert model(text, think="always", seed=0).logits.isfinite().all()
    out = model.generate(random_ids(1, 20), max_new_tokens=CONTEXT - 20 - M - 3, seed=0)
    assert out.shape == (1, CONTEXT - M - 3)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_does_not_fit_is_refused_before_any_call(name):
    model = longest(name)
    text = random_ids(1, CONTEXT - M - 1)
    words = rf"(?s)(?=.*\b{CONTEXT}\b)(?i:.*(context|position))"
    for call in (
        lambda: model.think_at_every_token(text, seed=0),
        lambda: model(text, think="always", seed=0),
        lambda: model.generate(text, max_new_tokens=5, seed=0),
        lambda: model.generate(text[:, :20], max_new_tokens=CONTEXT - 20, seed=0),
    ):
        with CallCounter(model) as counter, pytest.raises(ValueError, match=words):
            call()
        assert counter.calls == 0
    assert model.base(random_ids(1, CONTEXT)).logits.isfinite().all()
    assert model.generate(text, max_new_tokens=1, do_sample=False, think="never").shape[1] > M
