"""think="never" is the base model, and thinking leaves the base as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from .architectures import ARCHITECTURES
from .thinkers import CallCounter, padded, random_ids, thinker


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_forward_and_generate_are_those_of_the_base(name):
    model, ids = thinker(name, dtype=torch.float32), random_ids(2, 6)
    logits = model.base(ids).logits
    spoken = model.base.generate(ids, max_new_tokens=6, do_sample=False)
    model(ids, think="always", seed=1)
    model.generate(ids, max_new_tokens=2, seed=1)
    assert torch.equal(model(ids, think="never").logits, logits)
    never = model.generate(ids, max_new_tokens=6, do_sample=False, think="never")
    assert torch.equal(never, spoken)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_scores_are_bit_equal(attention):
    model = thinker(attention=attention, dtype=torch.float32)
    ids, mask = padded([random_ids(1, 6)[0], random_ids(1, 3)[0]], "left")
    options = {
        "attention_mask": mask,
        "max_new_tokens": 5,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    expected = model.base.generate(ids, **options)
    actual = model.generate(ids, think="never", **options)
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, theirs in zip(actual.scores, expected.scores, strict=True):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_never_makes_one_call_a_token_and_no_thoughts():
    model, ids = thinker(), random_ids(1, 4)
    with CallCounter(model) as counter:
        out = model.generate(ids, max_new_tokens=5, think="never", return_dict_in_generate=True)
    assert counter.calls == 5
    assert getattr(out, "thoughts", None) is None


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "opt"])
@torch.no_grad()
def test_thinking_leaves_the_base_as_it_was(name):
    model = thinker(name, attention="sdpa", dtype=torch.float32)
    base, ids = model.base, random_ids(2, 6)
    settings = copy.deepcopy(base.config.to_dict())
    attention = base.config._attn_implementation
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    logits, cached = base(ids).logits, base(ids, use_cache=True)
    model.think_at_every_token(ids, seed=1)
    model(ids, think="always", seed=1)
    model.generate(ids, max_new_tokens=3, seed=1)
    assert base.config._attn_implementation == attention
    assert base.config.to_dict() == settings
    assert all(torch.equal(base.state_dict()[name], old) for name, old in weights.items())
    assert torch.equal(base(ids).logits, logits)
    following = random_ids(2, 1, seed=9)
    step = base(following, past_key_values=cached.past_key_values).logits[:, -1]
    whole = base(torch.cat([ids, following], 1)).logits[:, -1]
    assert (step - whole).abs().max() < 1e-5


@torch.no_grad()
def test_the_base_can_speak_between_two_thoughts():
    model, ids = thinker(dtype=torch.float32), random_ids(1, 6)
    expected = model.think_at_every_token(ids, seed=1)
    model.base.generate(ids, max_new_tokens=3)
    model.base(random_ids(3, 9))
    again = model.think_at_every_token(ids, seed=1)
    assert torch.equal(again.tokens, expected.tokens)
    assert torch.equal(again.weight, expected.weight)


@torch.no_grad()
def test_an_official_model_never_says_start_or_end():
    """The one exception to bit identity: rows that mean nothing as text stay unsaid, however likely."""
    model, ids = thinker(official=True), random_ids(1, 4)
    model.base.get_output_embeddings().weight[-2:] = 100 * model.base.get_output_embeddings().weight[:1]
    reserved = set(model.config.reserved_ids)
    torch.manual_seed(1)
    assert reserved & set(model.base.generate(ids, max_new_tokens=12, do_sample=True).flatten().tolist())
    for think in ("never", "always"):
        out = model.generate(ids, max_new_tokens=12, do_sample=True, seed=1, think=think)
        assert not reserved & set(out.flatten().tolist())
