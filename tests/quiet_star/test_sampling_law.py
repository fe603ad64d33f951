"""The law of thoughts and answers through the public API: chi-square against the explicit softmax.

One text is repeated over thousands of rows, whose sequence ids alone differ. Seeds are fixed, so
the tests are deterministic; the bound is the 1 - 1e-5 quantile of chi-square (Wilson, Hilferty).
"""

from __future__ import annotations

import pytest
import torch

from . import sequential_reference as reference
from .architectures import explicit_logits
from .thinkers import random_ids, thinker

ROWS = 4000


def assert_follows(tokens, law):
    """Chi-square of token counts against probabilities [V]; rare classes are pooled."""
    counts = torch.bincount(tokens, minlength=len(law)).double()
    expected = law.double() * len(tokens)
    assert not counts[expected == 0].any()
    small = expected < 5
    observed = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    if expected[-1] < 5:  # too few even together: they join the last class
        observed = torch.cat([observed[:-2], observed[-2:].sum()[None]])
        expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
    freedom = len(expected) - 1
    assert freedom >= 1
    statistic = float(((observed - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 4.265 * spread**0.5) ** 3


def law_at(model, text, path, **processing):
    """Probabilities [V] of the token that follows the embedded sequence text, START, path."""
    embed = model.base.get_input_embeddings()
    start = reference.EMBEDDING_SCALE * model.start_embedding[None]
    sequence = torch.cat([embed(text), start, embed(torch.tensor(path, dtype=torch.int64))])
    logits = explicit_logits(model.base, reference.final_hidden(model.base, sequence))
    return processed(logits, **processing)


def processed(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities [V], by sorting: the textbook form of temperature, then top-k, then top-p."""
    law = (logits.double() / temperature).softmax(-1)
    order = law.argsort(descending=True)
    kept = order if top_k is None else order[:top_k]
    ranked = law[kept] / law[kept].sum()
    if top_p is not None:
        kept = kept[ranked.cumsum(0) - ranked < top_p]
    out = torch.zeros_like(law)
    out[kept] = law[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    "processing",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.8},
        {"top_k": 6},
        {"top_p": 0.6},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.8},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_first_thought_token(processing):
    model, text = thinker(m=1, dtype=torch.float32), random_ids(1, 2)
    options = {f"thought_{name}": value for name, value in processing.items()}
    thoughts = model.think_at_every_token(text.expand(ROWS, -1), seed=1, **options)
    for i in (0, 1):
        law = law_at(model, text[0, : i + 1], [], **processing)
        assert_follows(thoughts.tokens[:, i, 0, 0], law)


@torch.no_grad()
def test_the_second_thought_token_follows_the_first():
    model, text = thinker(m=2, dtype=torch.float32), random_ids(1, 1)
    tokens = model.think_at_every_token(text.expand(ROWS, -1), seed=2).tokens[:, 0, 0]
    first = int(tokens[:, 0].mode().values)
    followers = tokens[tokens[:, 0] == first, 1]
    assert len(followers) > 100
    assert_follows(followers, law_at(model, text[0], [first]))


@torch.no_grad()
def test_thoughts_of_one_position_are_independent():
    """Two thoughts follow the same law and agree as often as two independent draws do."""
    model, text = thinker(m=1, dtype=torch.float32), random_ids(1, 1)
    options = {"seed": 3, "thoughts_per_token": 2}
    tokens = model.think_at_every_token(text.expand(ROWS, -1), **options).tokens[:, 0, :, 0]
    law = law_at(model, text[0], [])
    for n in (0, 1):
        assert_follows(tokens[:, n], law)
    equal = (law**2).sum()
    pair = torch.stack([1 - equal, equal])
    assert_follows((tokens[:, 0] == tokens[:, 1]).long(), pair)


@torch.no_grad()
def test_temperature_zero_takes_the_largest():
    model, text = thinker(m=2), random_ids(1, 4)
    options = {"thought_temperature": 0.0, "thoughts_per_token": 2}
    thoughts = model.think_at_every_token(text.expand(5, -1), seed=4, **options)
    first = [int(law_at(model, text[0, : i + 1], []).argmax()) for i in range(4)]
    second = [int(law_at(model, text[0, : i + 1], [first[i]]).argmax()) for i in range(4)]
    expected = torch.tensor([first, second]).T  # [T, m]
    assert torch.equal(thoughts.tokens, expected[None, :, None].expand(5, -1, 2, -1))
    assert not thoughts.log_probs.any()


@pytest.mark.parametrize("processing", [{}, {"temperature": 0.6, "top_k": 9}], ids=str)
@torch.no_grad()
def test_the_answer_follows_the_mixed_logits(processing):
    model, prompt = thinker(m=2, dtype=torch.float32), random_ids(1, 3)
    thought_law = reference.Law(temperature=0.0)
    score = reference.answer(model, prompt[0], 1, m=2, thought_law=thought_law).scores[0]
    options = {"top_k": 0, **processing, "thought_temperature": 0.0}
    out = model.generate(prompt.expand(ROWS, -1), max_new_tokens=1, do_sample=True, seed=5, **options)
    assert_follows(out[:, 3], processed(score, **processing))


@torch.no_grad()
def test_official_models_never_think_or_say_start_and_end():
    """Even where the two extra rows have by far the largest logits."""
    model = thinker(m=3, dtype=torch.float32, official=True)
    head = model.base.get_output_embeddings().weight
    V = model(random_ids(1, 2), seed=0).logits.shape[-1] - 2
    assert V == 99
    assert len(head) == V + 2
    head[V:] = 20 * head[3:5]
    ids = random_ids(20, 5)
    assert (model(ids, seed=0).logits.argmax(-1) >= V).any()
    for temperature in (1.0, 0.0):
        options = {"seed": 6, "thought_temperature": temperature}
        tokens = model.think_at_every_token(ids, **options).tokens
        assert ((tokens >= 0) & (tokens < V)).all()
        for do_sample in (False, True):
            out = model.generate(ids, max_new_tokens=4, do_sample=do_sample, **options)
            assert (out < V).all()
