"""A training step's memory is linear in the text, and the logits of its rows never exist together."""

from __future__ import annotations

import pytest
import torch

from pyquiet import QuietStarObjective

from .test_memory import LENGTHS, TINY, allocations, assert_linear, text_of
from .thinkers import random_ids, thinker


def step(model, ids, objective):
    model.zero_grad()
    model.thinking_loss(ids, objective=objective, seed=0).loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step(checkpointing):
    model = thinker(m=1, dtype=torch.float32, attention="sdpa", **TINY).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = QuietStarObjective(lookahead=2, thoughts_per_token=1)
    _, largest = assert_linear(lambda ids: step(model, ids, objective))
    path_steps = 1 + 1 + 2
    assert largest < LENGTHS[-1] ** 2 * path_steps  # in bytes: not even a boolean mask over all paths
    if checkpointing:
        ids = text_of(256)
        peak, _ = allocations(lambda: step(model, ids, objective))
        plain, _ = allocations(lambda: step(model.eval(), ids, objective))  # in eval mode nothing is checkpointed
        assert peak < 0.7 * plain


def test_no_logits_of_the_whole_batch(monkeypatch):
    at_once = 1 << 17
    monkeypatch.setattr("pyquiet.heads._LOGITS_AT_ONCE", at_once)
    vocabulary, B, length = 8000, 2, 40
    sizes = {"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 16}
    model = thinker(m=2, dtype=torch.float32, attention="sdpa", **sizes)
    objective = QuietStarObjective(lookahead=3)
    peak, largest = allocations(lambda: step(model, random_ids(B, length), objective))
    assert largest <= 8 * at_once  # in float64, for the draws
    rows = B * (length - 1) * 2 * (2 + 3)
    assert 20 * largest < 4 * vocabulary * rows
    assert 2 * peak < 4 * vocabulary * rows  # nor are they kept for the backward pass, chunk by chunk
