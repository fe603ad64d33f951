"""The mix of base and thought, its two ends w = 0 and w = 1, and the loss."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import pyquiet

from . import sequential_reference as reference
from .architectures import ARCHITECTURES, build
from .thinkers import assert_close, linear_layers, padded, random_ids, thinker


def fresh(name="llama", m=2, **options):
    """A model straight from `from_base`: its mixing head has never been trained."""
    base = build(name, **options)
    return pyquiet.QuietStarForCausalLM.from_base(base, thought_tokens=m, start_init=7).eval()


def force_weight(model, value):
    """Makes the mixing head answer `value` whatever it sees."""
    return model.mixing_head.register_forward_hook(lambda _module, _inputs, out: torch.full_like(out, value))


def test_the_fresh_head_has_a_zero_last_layer_without_bias():
    model = fresh()
    first, second, last = linear_layers(model)
    d = model.base.config.hidden_size
    assert (first.in_features, first.out_features) == (2 * d, d)
    assert (second.in_features, second.out_features) == (d, d)
    assert (last.in_features, last.out_features) == (d, 1)
    assert first.bias is not None
    assert second.bias is not None
    assert last.bias is None
    assert not last.weight.any()
    assert first.weight.any()
    assert second.weight.any()


@torch.no_grad()
def test_the_head_is_two_relu_layers_and_a_line():
    model = thinker()
    first, second, last = linear_layers(model)
    pair = torch.randn(5, first.in_features, dtype=first.weight.dtype)
    expected = last(second(first(pair).relu()).relu())
    assert_close(model.mixing_head(pair).reshape(-1, 1), expected, 1e-12)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_weight_zero_is_bit_equal_to_the_base(name):
    model, ids = fresh(name), random_ids(2, 7)
    before = model.base(ids).logits
    assert torch.equal(model(ids, think="always", seed=1).logits, before)
    assert not model.think_at_every_token(ids, seed=1).weight.any()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@torch.no_grad()
def test_weight_zero_under_the_attention_of_transformers(attention, dtype):
    model, ids = fresh(attention=attention, dtype=dtype), random_ids(2, 7)
    assert torch.equal(model(ids, think="always", seed=1).logits, model.base(ids).logits)


@torch.no_grad()
def test_weight_zero_beside_padding():
    ids, mask = padded([random_ids(1, 7)[0], random_ids(1, 3)[0]], "right")
    model, here = fresh(attention="sdpa", dtype=torch.float32), mask.bool()
    mixed = model(ids, attention_mask=mask, think="always", seed=1).logits
    assert torch.equal(mixed[here], model.base(ids, attention_mask=mask).logits[here])


@torch.no_grad()
def test_weight_zero_generates_what_the_base_generates():
    model, ids = fresh(attention="sdpa", dtype=torch.float32), random_ids(1, 6)
    model.generation_config.eos_token_id = None
    spoken = model.base.generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, seed=1), spoken)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "gpt2"])
@torch.no_grad()
def test_weight_one_is_the_thought_path(name):
    model, ids = thinker(name, m=3), random_ids(1, 6)
    hook = force_weight(model, 1.0)
    logits = model(ids, think="always", seed=5).logits[0]
    hook.remove()
    for i in range(ids.shape[1]):
        noise = {"seed": 5, "sequence": 0}
        thought = reference.think(model, ids[0, : i + 1], 3, 0, noise, reference.Law())
        assert_close(logits[i], thought.thought_logits, 1e-12)
        assert (logits[i] - thought.base_logits).abs().max() > 0.01


@torch.no_grad()
def test_the_weight_is_that_of_the_thought_and_unbounded():
    model, ids = thinker(), random_ids(1, 5)
    ends = []
    for weight in (0.0, 1.0, -1.5):
        hook = force_weight(model, weight)
        ends.append(model(ids, think="always", seed=5).logits)
        assert (model.think_at_every_token(ids, seed=5).weight == weight).all()
        hook.remove()
    base, thought, outside = ends
    assert_close(outside, 2.5 * base - 1.5 * thought, 1e-11)


@torch.no_grad()
def test_several_thoughts_are_averaged_in_probability():
    model, ids = thinker(m=2), random_ids(2, 6)
    logits = model(ids, think="always", seed=3, thoughts_per_token=3).logits
    thoughts = model.think_at_every_token(ids, seed=3, thoughts_per_token=3)
    following = ids[:, 1:, None]
    actual = logits.softmax(-1)[:, :-1].gather(-1, following).squeeze(-1)
    assert_close(actual, thoughts.mixed_log_probs.exp().mean(-1), 1e-12)


@torch.no_grad()
def test_log_probs_are_those_of_the_next_token():
    model, ids = thinker(m=2), random_ids(2, 6)
    thoughts = model.think_at_every_token(ids, seed=3)
    mixed = model(ids, think="always", seed=3).logits.log_softmax(-1)[:, :-1]
    base = model.base(ids).logits.log_softmax(-1)[:, :-1]
    following = ids[:, 1:, None]
    assert_close(thoughts.mixed_log_probs, mixed.gather(-1, following), 1e-12)
    assert_close(thoughts.base_log_probs, base.gather(-1, following).squeeze(-1), 1e-12)


@torch.no_grad()
def test_the_loss_of_a_fresh_model_is_that_of_the_base():
    model, ids = fresh(), random_ids(2, 7)
    labels = ids.clone()
    labels[0, :3] = -100
    expected = model.base(ids, labels=labels).loss
    for think in ("always", "never"):
        assert_close(model(ids, labels=labels, think=think, seed=1).loss, expected, 1e-12)


@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_the_mixed_logits():
    model, ids = thinker(), random_ids(2, 7)
    labels = ids.clone()
    labels[1, 5:] = -100
    out = model(ids, labels=labels, think="always", seed=1)
    expected = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(out.loss, expected, 1e-6)  # transformers has the loss in float32
    assert model(ids, think="always", seed=1).loss is None
