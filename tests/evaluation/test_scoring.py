"""Continuations against the model's own thoughts after every token, one text at a time."""

from __future__ import annotations

import math

import pytest
import torch

import pyquiet
from pyquiet.evaluation.scoring import Continuation, number_of, score_continuations

GENERATOR = torch.Generator().manual_seed(0)
ROWS = [
    Continuation(
        torch.randint(3, 90, (b,), generator=GENERATOR).tolist(),
        torch.randint(3, 90, (t,), generator=GENERATOR).tolist(),
        number,
    )
    for b, t, number in ((7, 3, 5), (1, 6, 2**32 - 1), (12, 1, 0), (3, 9, 5))
]


@torch.no_grad()
def alone(model, row, think, N):
    """Log-probability of a continuation, and whether it is what greedy decoding writes, token by token."""
    ids = torch.tensor([row.before + row.tokens])
    start = len(row.before) - 1
    options = {"seed": 4, "sequence_ids": torch.tensor([row.number]), "thoughts_per_token": N}
    if think == "always":
        mixed = model.think_at_every_token(ids, **options).mixed_log_probs[0, start:]
        total = (mixed.logsumexp(1) - math.log(N)).sum()
        logits = model(ids, think="always", **options).logits
    else:
        logits = model.base(ids).logits
        total = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start:].sum()
    return float(total), bool((logits[0, start:-1].argmax(-1) == ids[0, start + 1 :]).all())


@pytest.mark.parametrize(("think", "N"), [("always", 1), ("always", 3), ("never", 1)])
def test_a_batch_scores_each_row_as_it_is_alone(reader, think, N):
    scores, likeliest = score_continuations(reader, ROWS, think=think, seed=4, thoughts_per_token=N)
    expected = [alone(reader, row, think, N) for row in ROWS]
    assert scores.tolist() == pytest.approx([score for score, _ in expected], abs=1e-10)
    assert likeliest.tolist() == [greedy for _, greedy in expected] == [False] * 4
    turned, _ = score_continuations(reader, ROWS[::-1], think=think, seed=4, thoughts_per_token=N)
    assert turned.tolist() == pytest.approx(scores.tolist()[::-1], abs=1e-10)


@pytest.mark.parametrize("think", ["always", "never"])
def test_what_greedy_decoding_writes_is_known(reader, think):
    prompt = ROWS[0].before
    options = {"seed": 4, "sequence_ids": torch.tensor([5])} if think == "always" else {}
    written = reader.generate(
        torch.tensor([prompt]),
        think=think,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        **options,
    )
    tokens = written[0, len(prompt) :].tolist()
    other = [*tokens[:-1], (tokens[-1] + 1) % 90]
    rows = [Continuation(prompt, tokens, 5), Continuation(prompt, other, 5), Continuation(prompt, tokens[:2], 5)]
    assert score_continuations(reader, rows, think=think, seed=4)[1].tolist() == [True, False, True]


def test_a_plain_model_is_its_own_base(reader):
    expected = score_continuations(reader, ROWS, think="never")
    found = score_continuations(reader.base, ROWS, think="never")
    assert torch.equal(found[0], expected[0])


def test_one_chunk_of_logits_or_many(reader, monkeypatch):
    expected, _ = score_continuations(reader, ROWS, think="always", seed=4)
    monkeypatch.setattr("pyquiet.heads._LOGITS_AT_ONCE", 1)
    assert score_continuations(reader, ROWS, think="always", seed=4)[0].tolist() == pytest.approx(expected.tolist())


def test_numbers_tell_requests_apart_and_stay():
    assert number_of([1, 2], 3) == number_of([1, 2], 3)
    assert len({number_of([1, 2], 3), number_of([1, 2], 4), number_of([1, 23]), number_of([12, 3])}) == 4
    assert 0 <= number_of([]) < 2**32


def test_bad_rows_are_refused(reader):
    with pytest.raises(ValueError, match="always"):
        score_continuations(reader.base, ROWS, think="always")
    with pytest.raises(ValueError, match="input_ids too long"):
        score_continuations(reader, [Continuation([3] * 700, [4], 0)], think="always")
    base = pyquiet.load("tiny-causal")[0]
    base.lm_head.weight.data[7] = torch.nan
    with pytest.raises(ValueError, match="row 0: the model's logits are NaN"):
        score_continuations(base, ROWS, think="never")
