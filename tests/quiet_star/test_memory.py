"""Thoughts over a text of T tokens take memory linear in T, and no tensor of T x T is made.

Every allocation of torch on the CPU is recorded by the profiler; nothing is timed.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from pyquiet.quiet_star.thinking import Thinker

from ..allocations import allocations
from .thinkers import random_ids, thinker

# From 768 tokens on SDPA takes larger blocks, a jump that has nothing to do with the thoughts.
LENGTHS = (128, 256, 512)
TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "max_position_embeddings": 1024,
}


def text_of(length):
    return random_ids(1, length) % (TINY["vocab_size"] - 3) + 3


@torch.no_grad()
def test_the_recorder_sees_a_square():
    values = torch.randn(512, 4)
    peak, largest = allocations(lambda: (values @ values.T).softmax(-1))
    assert largest == 512 * 512 * 4
    assert peak >= 2 * largest


def assert_linear(call):
    """The peak of call(text) at most a little more than doubles with the text; returns that and the largest tensor.

    The largest one need not: SDPA's scratch, which grows in steps, may be it.
    """
    figures = [allocations(functools.partial(call, text_of(length))) for length in LENGTHS]
    for before, after in itertools.pairwise(figures):
        assert after[0] < 2.3 * before[0]
    return figures[-1]


@pytest.mark.parametrize("thoughts", [1, 3])
@torch.no_grad()
def test_thoughts_of_a_text(thoughts):
    model = thinker(m=2, dtype=torch.float32, attention="sdpa", **TINY)
    options = {"seed": 0, "thoughts_per_token": thoughts}
    _, largest = assert_linear(lambda ids: model.think_at_every_token(ids, **options))
    # In bytes, so that for a single thought not even a boolean mask of T x T fits.
    assert largest < thoughts * LENGTHS[-1] ** 2


@torch.no_grad()
def test_the_full_forward():
    model = thinker(m=2, dtype=torch.float32, attention="sdpa", **TINY)
    _, largest = assert_linear(lambda ids: model(ids, think="always", seed=0))
    assert largest < LENGTHS[-1] ** 2


@torch.no_grad()
def test_generation_keeps_no_thoughts_behind(monkeypatch):
    """After every token the cache holds the text read so far and nothing of the paths."""
    lengths = []
    think = Thinker.think

    def watched(self, limits, new_text=None):
        result = think(self, limits, new_text)
        for layer in self.cache.layers:
            assert layer.path_keys is layer.path_values is None
            lengths.append(layer.get_seq_length())
        return result

    monkeypatch.setattr(Thinker, "think", watched)
    thinker(m=5, dtype=torch.float32, attention="sdpa", **TINY).generate(text_of(8), max_new_tokens=6, seed=0)
    assert lengths == [n for n in range(8, 14) for _ in range(2)]  # two layers
