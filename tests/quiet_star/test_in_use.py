"""A thinking model beside other uses of itself and its base: inside processors, under checkpointing, with configs."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from .thinkers import random_ids, thinker


class Asks(LogitsProcessor):
    """Runs something at every token and changes nothing."""

    def __init__(self, call):
        self.call = call

    def __call__(self, input_ids, scores):
        self.call(input_ids)
        return scores


@pytest.mark.parametrize("who", ["base", "model", "never"])
@torch.no_grad()
def test_the_model_may_be_used_while_it_generates(who):
    model, ids = thinker(dtype=torch.float32, attention="sdpa"), random_ids(1, 4)
    calls = {
        "base": model.base,
        "model": lambda i: model(i, seed=0),
        "never": lambda i: model.generate(i, max_new_tokens=1, think="never"),
    }
    options = {"max_new_tokens": 4, "seed": 1, "do_sample": True}
    processors = LogitsProcessorList([Asks(calls[who])])
    assert torch.equal(model.generate(ids, logits_processor=processors, **options), model.generate(ids, **options))


@torch.no_grad()
def test_a_base_may_scale_in_place_what_it_gets():
    model, ids = thinker(), random_ids(2, 5)
    expected = model.think_at_every_token(ids, seed=1)

    def scale(_, args, kwargs):  # as CTRL does
        kwargs["inputs_embeds"].mul_(1)

    model.base.base_model.register_forward_pre_hook(scale, with_kwargs=True)
    assert torch.equal(model.think_at_every_token(ids, seed=1).weight, expected.weight)


@torch.no_grad()
def test_activation_checkpointing_does_not_matter():
    model, ids = thinker(dtype=torch.float32, attention="sdpa"), random_ids(2, 5)
    expected = model.think_at_every_token(ids, seed=1)
    model.gradient_checkpointing_enable()
    model.train()
    actual = model.think_at_every_token(ids, seed=1)
    assert torch.equal(actual.tokens, expected.tokens)
    assert torch.equal(actual.mixed_log_probs, expected.mixed_log_probs)
    assert model.base.is_gradient_checkpointing


@torch.no_grad()
def test_a_given_generation_config_is_merged_with_the_models():
    model = thinker(dtype=torch.float32, attention="sdpa", max_position_embeddings=32)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    ids = random_ids(2, 6).clamp_min(1)
    ids[0, :2] = 0
    options = {"max_new_tokens": 3, "seed": 1}
    with_mask = model.generate(ids, attention_mask=(ids != 0).long(), **options)
    assert torch.equal(model.generate(ids, GenerationConfig(max_new_tokens=3), seed=1), with_mask)
    alone = model.generate(ids[:1], **options)
    assert torch.equal(alone[0], with_mask[0])
    model.generation_config.max_new_tokens = 60
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model.generate(ids, GenerationConfig(do_sample=True), seed=1)


@torch.no_grad()
def test_the_vocabulary_may_grow():
    model, ids = thinker(dtype=torch.float32, attention="sdpa"), random_ids(1, 4)
    before = model.base.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(before + 8)
    assert model(ids, seed=0).logits.shape[-1] == before + 8
    official = thinker(official=True, attention="sdpa")
    with pytest.raises(ValueError, match="official"):
        official.resize_token_embeddings(before + 8)


@pytest.mark.parametrize("m", [0, 2])
@torch.no_grad()
def test_nan_is_named_however_short_the_thought(m):
    model, ids = thinker(m=m, dtype=torch.float32, attention="sdpa"), random_ids(1, 4)
    model.base.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(ValueError, match="row 0"):
        model.think_at_every_token(ids, seed=0)


@pytest.mark.parametrize("name", ["position_ids", "cache_implementation", "custom_generate"])
def test_what_generate_cannot_use_is_refused(name):
    model, ids = thinker(), random_ids(1, 4)
    with pytest.raises(ValueError, match=name):
        model.generate(ids, max_new_tokens=1, **{name: ids if name == "position_ids" else "static"})


@torch.no_grad()
def test_threads_may_generate_with_one_model():
    model, ids = thinker(dtype=torch.float32, attention="sdpa"), random_ids(2, 4)
    options = {"max_new_tokens": 6, "do_sample": True}
    expected = [model.generate(ids, seed=seed, **options) for seed in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # in the middle of forwards, many times
    try:
        with ThreadPoolExecutor(4) as pool:
            actual = list(pool.map(lambda seed: model.generate(ids, seed=seed, **options), range(8)))
    finally:
        sys.setswitchinterval(interval)
    assert all(map(torch.equal, actual, expected))
    assert model.base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("begun", [False, True], ids=["before its mask is made", "after"])
@torch.no_grad()
def test_a_base_that_another_thread_thinks_with_says_so(begun):
    model, ids = thinker(dtype=torch.float32, attention="sdpa"), random_ids(1, 4)
    expected = model.generate(ids, max_new_tokens=3, seed=1)
    calls, reached, lent = [], threading.Event(), threading.Event()

    def at_a_layer(*_):
        if threading.current_thread() is not threading.main_thread():
            reached.set()
            assert lent.wait(20) == begun, "another thread's call went past its mask"
        elif not lent.is_set():
            if begun:
                lent.set()
            else:
                calls.append(pool.submit(model.base, ids))
            with pytest.raises(RuntimeError, match="another thread thinks"):
                calls[0].result(20)
            lent.set()

    model.base.base_model.layers[0].register_forward_pre_hook(at_a_layer)
    with ThreadPoolExecutor(1) as pool:
        if begun:
            calls.append(pool.submit(model.base, ids))
            assert reached.wait(20)
        assert torch.equal(model.generate(ids, max_new_tokens=3, seed=1), expected)
