"""`think_at_every_token` and the full forward equal explicit sequences, one for each thought."""

from __future__ import annotations

import pytest
import torch

from pyquiet.quiet_star.thinking import Text as Span
from pyquiet.quiet_star.thinking import Thinker, ThoughtOptions

from . import sequential_reference as reference
from .architectures import ARCHITECTURES, ODD_HEADS
from .thinkers import (
    TOLERANCE,
    assert_close,
    assert_same_thoughts,
    padded,
    random_ids,
    thinker,
)

ALL = [*ARCHITECTURES, *ODD_HEADS]


def check_text(model, ids, mask=None, *, m, thoughts, tolerance, seed=11, **laws):
    """Thoughts and mixed logits of one batch equal those of the explicit sequences."""
    law = reference.Law(**laws)
    expected = reference.think_everywhere(model, ids, mask, m=m, thoughts=thoughts, seed=seed, law=law)
    options = {"seed": seed, "thoughts_per_token": thoughts}
    options |= {f"thought_{name}": value for name, value in laws.items()}
    with torch.no_grad():
        actual = model.think_at_every_token(ids, mask, **options)
        logits = model(ids, attention_mask=mask, think="always", **options).logits
    assert expected.weight.max() > 0.05  # else the thoughts would not reach the logits
    assert_same_thoughts(actual, expected, tolerance)
    here = torch.ones_like(ids).bool() if mask is None else mask.bool()
    if thoughts == 1:
        assert_close(logits[here], expected.logits[:, :, 0][here], tolerance)
    else:
        mean = reference.mean_log_probs(expected.logits.movedim(2, 0))
        assert_close(logits[here].log_softmax(-1), mean[here], tolerance)


@pytest.mark.parametrize("name", ALL)
def test_every_architecture_in_float64(name):
    ids, mask = padded([random_ids(1, 7, seed=1)[0], random_ids(1, 4, seed=2)[0]], "left")
    check_text(thinker(name, m=3), ids, mask, m=3, thoughts=2, tolerance=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_every_architecture_in_float32(name):
    ids, mask = padded([random_ids(1, 7, seed=3)[0], random_ids(1, 5, seed=4)[0]], "right")
    model = thinker(name, m=2, dtype=torch.float32)
    check_text(model, ids, mask, m=2, thoughts=1, tolerance=TOLERANCE[torch.float32])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_attention_functions_of_transformers(name, attention, side):
    ids, mask = padded([random_ids(1, 8, seed=5)[0], random_ids(1, 3, seed=6)[0]], side)
    model = thinker(name, m=2, dtype=torch.float32, attention=attention)
    check_text(model, ids, mask, m=2, thoughts=1, tolerance=TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_sdpa_is_exact_in_float64(name):
    model = thinker(name, m=3, attention="sdpa")
    check_text(model, random_ids(2, 8), m=3, thoughts=1, tolerance=1e-12)


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("thoughts", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_lengths_and_numbers_of_thoughts(m, thoughts, dtype):
    model = thinker("llama", m=m, dtype=dtype)
    ids = random_ids(1, 6, seed=m)
    check_text(model, ids, m=m, thoughts=thoughts, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("m", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_padding_beside_a_window(side, m, dtype):
    rows = [random_ids(1, length, seed=length)[0] for length in (1, 9, 5)]
    ids, mask = padded(rows, side)
    model = thinker("mistral", m=m, dtype=dtype)
    check_text(model, ids, mask, m=m, thoughts=2, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("law", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.6}], ids=str)
def test_the_law_of_the_thoughts(law):
    check_text(thinker(m=3), random_ids(2, 5), m=3, thoughts=2, tolerance=1e-12, **law)


def test_a_text_of_one_token():
    check_text(thinker(m=2), random_ids(2, 1), m=2, thoughts=2, tolerance=1e-12)


def test_a_mask_of_ones_and_a_boolean_mask_change_nothing():
    model, ids = thinker(), random_ids(2, 5)
    plain = model.think_at_every_token(ids, seed=4)
    assert_same_thoughts(model.think_at_every_token(ids, torch.ones_like(ids), seed=4), plain, 1e-12)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    number = model.think_at_every_token(ids, mask, seed=4)
    assert_same_thoughts(model.think_at_every_token(ids, mask.bool(), seed=4), number, 0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_batched_equals_alone(side, dtype):
    model = thinker("qwen3", m=3, dtype=dtype)
    rows = [random_ids(1, length, seed=length)[0] for length in (4, 9, 6)]
    ids, mask = padded(rows, side)
    numbers = torch.tensor([5, 0, 2**31])
    batch = model.think_at_every_token(ids, mask, seed=8, sequence_ids=numbers)
    for b, row in enumerate(rows):
        alone = model.think_at_every_token(row[None], seed=8, sequence_ids=numbers[b : b + 1])
        slots = mask[b].bool()
        assert torch.equal(batch.tokens[b, slots], alone.tokens[0])
        assert_close(batch.weight[b, slots], alone.weight[0], TOLERANCE[dtype])
        assert_close(batch.log_probs[b, slots], alone.log_probs[0], TOLERANCE[dtype])
        for name in ("mixed_log_probs", "base_log_probs"):
            inside = getattr(batch, name)[b, slots[1:] & slots[:-1]]
            assert_close(inside, getattr(alone, name)[0], TOLERANCE[dtype])


def test_padding_holds_minus_one_and_zeros():
    ids, mask = padded([random_ids(1, 6)[0], random_ids(1, 3)[0]], "left")
    thoughts = thinker(m=2).think_at_every_token(ids, mask, seed=0)
    assert thoughts.tokens.dtype == torch.int64
    assert (thoughts.tokens[1, :3] == -1).all()
    assert (thoughts.tokens[1, 3:] >= 0).all()
    for name in ("log_probs", "weight", "mixed_log_probs", "base_log_probs"):
        values = getattr(thoughts, name)[1]
        assert not values[:3].any()
        assert values[3:].all()


def test_the_first_of_three_thoughts_is_the_only_one():
    """N shared-prefix thoughts are N separate runs: thought n does not know of the others."""
    model, ids = thinker(m=3), random_ids(2, 6)
    one = model.think_at_every_token(ids, seed=2)
    three = model.think_at_every_token(ids, seed=2, thoughts_per_token=3)
    assert torch.equal(three.tokens[:, :, :1], one.tokens)
    assert not torch.equal(three.tokens[:, :, 0], three.tokens[:, :, 1])
    assert_close(three.weight[:, :, :1], one.weight, 1e-12)
    assert_close(three.mixed_log_probs[:, :, :1], one.mixed_log_probs, 1e-12)


def test_seeds():
    model, ids = thinker(m=3), random_ids(2, 6)
    first = model.think_at_every_token(ids, seed=1).tokens
    assert torch.equal(model.think_at_every_token(ids, seed=1).tokens, first)
    assert not torch.equal(model.think_at_every_token(ids, seed=2).tokens, first)
    rows = model.think_at_every_token(ids[:1].expand(2, -1), seed=1).tokens
    assert not torch.equal(rows[0], rows[1])
    torch.manual_seed(0)
    unseeded = [model.think_at_every_token(ids).tokens for _ in range(2)]
    assert not torch.equal(*unseeded)
    torch.manual_seed(0)
    assert torch.equal(model.think_at_every_token(ids).tokens, unseeded[0])


def test_an_explicit_seed_leaves_the_generator_of_torch_alone():
    model, ids = thinker(m=2), random_ids(1, 5)
    before = torch.get_rng_state()
    model.think_at_every_token(ids, seed=1)
    model.generate(ids, max_new_tokens=2, seed=1, do_sample=True)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chosen_positions_are_those_of_the_whole(side, dtype):
    """Whatever else is computed beside them; columns may come in any order, twice, and differ from row to row."""
    model = thinker(m=2, dtype=dtype)
    ids, mask = padded([random_ids(1, 9)[0], random_ids(1, 6, seed=1)[0]], side)
    whole = model.think_at_every_token(ids, mask, seed=3, thoughts_per_token=2)
    for positions in (torch.tensor([8, 2, 5]), torch.tensor([[0, 7, 8, 3], [5, 5, 1, 8]])):
        part = model.think_at_every_token(ids, mask, positions=positions, seed=3, thoughts_per_token=2)
        columns = positions.expand(2, -1)
        rows = torch.arange(2)[:, None]
        assert torch.equal(part.tokens, whole.tokens[rows, columns])
        for name in ("log_probs", "weight"):
            assert_close(getattr(part, name), getattr(whole, name)[rows, columns], TOLERANCE[dtype])
        for name in ("mixed_log_probs", "base_log_probs"):
            expected = torch.cat([getattr(whole, name), torch.zeros_like(getattr(whole, name)[:, :1])], 1)
            assert_close(getattr(part, name), expected[rows, columns], TOLERANCE[dtype])
        assert part.mixed_log_probs.any()


def test_thoughts_that_share_a_prefix_are_those_drawn_apart():
    """The n-th of N thoughts is a single thought drawn at its index; here, N return sequences of one thought each."""
    model, ids = thinker(m=2), random_ids(1, 6)
    together = model.think_at_every_token(ids, seed=3, thoughts_per_token=3)
    for n in range(3):
        text, options = Span.of(ids, None), ThoughtOptions(seed=3, thoughts=1)
        apart = Thinker(model, text, options, return_index=torch.tensor([n]))
        hidden = apart.read(ids)
        round_ = apart.think(torch.arange(1, 7)[None])
        assert torch.equal(round_.tokens[:, :, 0], together.tokens[:, :, n])
        assert_close(model.mix(hidden, round_.end_hidden)[..., 0], together.weight[..., n], 1e-12)


@pytest.mark.parametrize(
    ("positions", "error"),
    [
        (torch.tensor([6]), ValueError),
        (torch.tensor([-1]), ValueError),
        (torch.tensor([[1], [2], [3]]), ValueError),
        (torch.empty(0, dtype=torch.int64), ValueError),
        (torch.tensor([1.0]), TypeError),
        (torch.tensor([True]), TypeError),
        ([1, 2], TypeError),
    ],
    ids=str,
)
def test_positions_out_of_range(positions, error):
    with pytest.raises(error, match="positions"):
        thinker(m=1).think_at_every_token(random_ids(2, 6), positions=positions)
