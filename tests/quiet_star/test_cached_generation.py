"""Cached generation equals explicit sequences, the full forward, and itself in any batch."""

from __future__ import annotations

import pytest
import torch

from . import sequential_reference as reference
from .architectures import ARCHITECTURES, ODD_HEADS
from .thinkers import (
    TOLERANCE,
    CallCounter,
    assert_close,
    padded,
    random_ids,
    thinker,
    tokens_of,
)

DICT = {"return_dict_in_generate": True, "return_thoughts": True}
ALL = [*ARCHITECTURES, *ODD_HEADS]
# Every kind of layer, position and head that the cache and the kernel tell apart.
KINDS = ["llama", "mistral", "gpt2", "gemma2", "gemma3", "olmo3", *ODD_HEADS]


def assert_same_answer(out, row, prompt_length, expected, tolerance):
    """Row `row` of the result of `generate` is the answer of the sequential reference."""
    assert tokens_of(out, prompt_length)[row].tolist() == expected.tokens
    for t, made in enumerate(expected.thoughts):
        for n, thought in enumerate(made):
            assert torch.equal(out.thoughts.tokens[row, t, n], thought.tokens)
            assert_close(out.thoughts.log_probs[row, t, n], thought.log_probs, tolerance)
            assert_close(out.thoughts.weight[row, t, n], thought.weight, tolerance)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float64) for name in ALL), *((name, torch.float32) for name in KINDS)], ids=str
)
def test_sampling_equals_the_explicit_sequences(name, dtype):
    model, prompt = thinker(name, m=2, dtype=dtype), random_ids(1, 4, seed=3)
    expected = reference.answer(model, prompt[0], 5, m=2, seed=17)
    options = {"do_sample": True, "top_k": 0, **DICT}
    out = model.generate(prompt, max_new_tokens=5, seed=17, **options)
    assert_same_answer(out, 0, 4, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_32_greedy_tokens_equal_the_full_forward(name):
    """Also beyond the window, and past the point where a sliding cache would forget."""
    model, prompt = thinker(name, m=2), random_ids(1, 5)
    out = model.generate(prompt, max_new_tokens=32, do_sample=False, seed=2, **DICT)
    text = out.sequences
    logits = model(text, think="always", seed=2).logits
    whole = model.think_at_every_token(text, seed=2)
    made = slice(4, 36)  # the positions after which an answer token was chosen
    assert torch.equal(logits[:, made].argmax(-1), text[:, 5:])
    assert torch.equal(out.thoughts.tokens, whole.tokens[:, made])
    assert_close(out.thoughts.weight, whole.weight[:, made], 1e-12)
    assert_close(out.thoughts.log_probs, whole.log_probs[:, made], 1e-12)


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("thoughts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_lengths_and_numbers_of_thoughts(m, thoughts, dtype):
    model, prompt = thinker(m=m, dtype=dtype), random_ids(1, 4)
    expected = reference.answer(model, prompt[0], 4, m=m, thoughts=thoughts, seed=5)
    options = {"do_sample": True, "top_k": 0, "thoughts_per_token": thoughts, **DICT}
    out = model.generate(prompt, max_new_tokens=4, seed=5, **options)
    assert out.thoughts.tokens.shape == (1, 4, thoughts, m)
    assert_same_answer(out, 0, 4, expected, TOLERANCE[dtype])


LAWS = {
    "temperature": ({"temperature": 0.6}, {}),
    "top_k": ({"top_k": 4}, {"top_k": 3}),
    "top_p": ({"top_p": 0.7}, {"top_p": 0.5}),
    "all": (
        {"temperature": 1.5, "top_k": 9, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 6, "top_p": 0.8},
    ),
    "greedy thoughts": ({}, {"temperature": 0.0}),
}


@pytest.mark.parametrize("name", LAWS)
def test_the_laws_of_answer_and_thought_are_separate(name):
    model, prompt = thinker(m=2), random_ids(1, 4)
    law, thought_law = LAWS[name]
    expected = reference.answer(
        model,
        prompt[0],
        6,
        m=2,
        seed=9,
        law=reference.Law(**law),
        thought_law=reference.Law(**thought_law),
    )
    options = {"do_sample": True, "top_k": 0, **law, **DICT}
    options |= {f"thought_{key}": value for key, value in thought_law.items()}
    out = model.generate(prompt, max_new_tokens=6, seed=9, **options)
    assert_same_answer(out, 0, 4, expected, 1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "olmo3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_three_lengths_in_a_batch_equal_three_runs(side, name, dtype):
    model = thinker(name, m=2, dtype=dtype)
    rows = [random_ids(1, length, seed=length)[0] for length in (3, 9, 5)]
    ids, mask = padded(rows, side)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 8, "seed": 4, **DICT}
    batch = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(batch.sequences[:, : ids.shape[1]], ids)
    for b, row in enumerate(rows):
        alone = model.generate(row[None], sequence_ids=torch.tensor([b]), **options)
        new = tokens_of(batch, ids.shape[1])[b]
        assert torch.equal(new, tokens_of(alone, len(row))[0])
        assert torch.equal(batch.thoughts.tokens[b], alone.thoughts.tokens[0])
        assert_close(batch.thoughts.weight[b], alone.thoughts.weight[0], TOLERANCE[dtype])
        assert_close(batch.thoughts.log_probs[b], alone.thoughts.log_probs[0], TOLERANCE[dtype])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_equals_the_explicit_sequences(side):
    model = thinker("mistral", m=2)
    rows = [random_ids(1, length, seed=length)[0] for length in (2, 8)]
    ids, mask = padded(rows, side)
    options = {"do_sample": True, "top_k": 0, "thoughts_per_token": 2, **DICT}
    out = model.generate(ids, attention_mask=mask, max_new_tokens=5, seed=4, **options)
    for b, row in enumerate(rows):
        expected = reference.answer(model, row, 5, m=2, thoughts=2, seed=4, sequence=b)
        assert_same_answer(out, b, 8, expected, 1e-12)


def test_sequence_ids_name_the_noise():
    model, ids = thinker(m=2), random_ids(1, 5).expand(3, -1)
    options = {"do_sample": True, "max_new_tokens": 6, "seed": 1, **DICT}
    numbers = torch.tensor([7, 2, 7])
    out = model.generate(ids, sequence_ids=numbers, **options)
    assert torch.equal(out.sequences[0], out.sequences[2])
    assert torch.equal(out.thoughts.tokens[0], out.thoughts.tokens[2])
    assert not torch.equal(out.thoughts.tokens[0], out.thoughts.tokens[1])
    default = model.generate(ids, **options)
    third = model.generate(ids[:1], sequence_ids=torch.tensor([2]), **options)
    assert torch.equal(default.thoughts.tokens[2], third.thoughts.tokens[0])


@pytest.mark.parametrize("thoughts", [1, 2])
def test_every_return_is_its_own_run(thoughts):
    model, ids = thinker(m=2), random_ids(2, 4)
    options = {"do_sample": True, "top_k": 0, "thoughts_per_token": thoughts, **DICT}
    out = model.generate(ids, max_new_tokens=4, num_return_sequences=3, seed=6, **options)
    single = model.generate(ids, max_new_tokens=4, seed=6, **options)
    assert out.sequences.shape == (6, 8)
    assert torch.equal(out.sequences[::3], single.sequences)
    assert torch.equal(out.thoughts.tokens[::3], single.thoughts.tokens)
    for row in range(6):
        b, copy = divmod(row, 3)
        expected = reference.answer(model, ids[b], 4, m=2, thoughts=thoughts, seed=6, sequence=b, copy=copy)
        assert_same_answer(out, row, 4, expected, 1e-12)


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_token_costs_m_plus_1_calls_and_m_plus_3_token_passes(m, rows):
    model, ids = thinker(m=m), random_ids(rows, 6)
    with CallCounter(model) as counter:
        out = model.generate(ids, max_new_tokens=7, seed=1, **DICT)
    assert counter.calls == 7 * (m + 1)
    calls = sum(out.calls.values())
    assert calls.dtype == torch.int64
    assert calls.tolist() == [7 * (m + 1)] * rows
    # The prompt of 6 is read with the first START; each later call of the kind reads one token.
    assert out.token_passes.tolist() == [5 + 7 * (m + 3)] * rows


def test_several_thoughts_share_the_calls():
    model, ids = thinker(m=3), random_ids(2, 6)
    with CallCounter(model) as counter:
        model.generate(ids, max_new_tokens=5, seed=1, thoughts_per_token=4)
    assert counter.calls == 5 * 4


def test_a_longer_answer_begins_with_the_shorter():
    model, ids = thinker(m=2), random_ids(1, 4)
    options = {"do_sample": True, "seed": 8}
    short = model.generate(ids, max_new_tokens=4, **options)
    whole = model.generate(ids, max_new_tokens=12, **options)
    assert torch.equal(whole[:, :8], short)
    # Continuing the short answer as a prompt draws the same noise: positions count the text.
    options["attention_mask"] = torch.ones_like(short)  # a random model may well have said PAD
    assert torch.equal(model.generate(short, max_new_tokens=8, **options), whole)
