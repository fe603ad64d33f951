"""Trained models think and speak: stories260K and the embedded one, with a head that has w > 0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pyquiet

from .thinkers import assert_close, awake, padded, tokens_of

STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260K"
EMBEDDED = Path(pyquiet.__file__).parent / "zoo" / "tiny-causal"
DICT = {"return_dict_in_generate": True, "return_thoughts": True}


def stories():
    if not STORIES.is_dir():
        pytest.skip(f"the model stories260K is not at {STORIES}")
    return AutoModelForCausalLM.from_pretrained(STORIES), AutoTokenizer.from_pretrained(STORIES)


def embedded():
    if not (EMBEDDED / "config.json").is_file():
        pytest.skip("this copy of pyquiet has no embedded model")
    return pyquiet.load("tiny-causal")


@pytest.fixture(scope="module", params=[stories, embedded], ids=["stories260K", "tiny-causal"])
def real(request):
    base, tokenizer = request.param()
    assert base.dtype == torch.float32
    model = pyquiet.QuietStarForCausalLM.from_base(base, tokenizer=tokenizer, thought_tokens=5)
    return awake(model), tokenizer


@torch.no_grad()
def test_it_thinks_and_speaks(real):
    model, tokenizer = real
    ids = tokenizer("Once upon a time, there was a", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=24, do_sample=True, seed=1, **DICT)
    new, V = tokens_of(out, ids.shape[1]), model.base.config.vocab_size
    assert new.shape == (1, 24)
    assert ((new >= 0) & (new < V)).all()
    assert ((out.thoughts.tokens >= 0) & (out.thoughts.tokens < V)).all()
    assert out.thoughts.tokens.shape == (1, 24, 1, 5)
    assert (out.thoughts.weight > 0).all()
    assert tokenizer.decode(new[0]).strip()


@pytest.mark.parametrize("thoughts", [1, 2])
@torch.no_grad()
def test_cached_equals_the_full_forward(real, thoughts):
    model, tokenizer = real
    ids = tokenizer("The little bird said", return_tensors="pt").input_ids
    options = {"seed": 2, "thoughts_per_token": thoughts}
    out = model.generate(ids, max_new_tokens=32, do_sample=False, **options, **DICT)
    text, L = out.sequences, ids.shape[1]
    made = slice(L - 1, L + 31)
    logits = model(text, think="always", **options).logits
    whole = model.think_at_every_token(text, **options)
    assert torch.equal(logits[:, made].argmax(-1), text[:, L:])
    assert torch.equal(out.thoughts.tokens, whole.tokens[:, made])
    assert_close(out.thoughts.weight, whole.weight[:, made], 1e-4)


@torch.no_grad()
def test_a_batch_equals_single_runs(real):
    model, tokenizer = real
    texts = ["Once upon a time", "The sun", "A boy and his dog went to the park to"]
    rows = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    ids, mask = padded(rows, "left")
    options = {"max_new_tokens": 12, "do_sample": True, "seed": 3}
    batch = model.generate(ids, attention_mask=mask, **options)
    for b, row in enumerate(rows):
        alone = model.generate(row[None], sequence_ids=torch.tensor([b]), **options)
        assert torch.equal(batch[b, ids.shape[1] :], alone[0, len(row) :])


@torch.no_grad()
def test_thinking_changes_what_a_trained_model_predicts(real):
    model, tokenizer = real
    ids = tokenizer("Lily liked to play in the garden.", return_tensors="pt").input_ids
    thoughts = model.think_at_every_token(ids, seed=4)
    assert thoughts.mixed_log_probs.isfinite().all()
    assert (thoughts.mixed_log_probs[..., 0] - thoughts.base_log_probs).abs().max() > 1e-3


@torch.no_grad()
def test_never_is_the_trained_model(real):
    model, tokenizer = real
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, think="never", **options), model.base.generate(ids, **options))
