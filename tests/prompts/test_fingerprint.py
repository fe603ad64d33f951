"""What tells one model, or one tokenizer, from another."""

import copy

import torch

import pyquiet
from pyquiet.prompts import model_digest, tokenizer_digest


def test_weights_their_order_and_configurations_count():
    model, _ = pyquiet.load("tiny-puzzler")
    digest = model_digest(model)
    assert model_digest(pyquiet.load("tiny-puzzler")[0]) == digest
    with torch.no_grad():
        weight = model.base.model.norm.weight
        weight.copy_(weight.flip(0))
        assert model_digest(model) != digest
        weight.copy_(weight.flip(0))
    assert model_digest(model) == digest
    model.config.thoughts_per_token += 1
    assert model_digest(model) != digest
    model.config.thoughts_per_token -= 1
    model.config._name_or_path = "elsewhere"
    model.base.config._name_or_path = "elsewhere"
    assert model_digest(model) == digest
    model.base.config.rms_norm_eps *= 2
    assert model_digest(model) != digest


def test_what_a_tokenizer_does_to_a_text_counts_and_its_padding_does_not():
    _, tokenizer = pyquiet.load("tiny-causal")
    digest = tokenizer_digest(tokenizer)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(tokenizer) == digest
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = pyquiet.load("tiny-puzzler")[1].backend_tokenizer.post_processor
    assert other.get_vocab() == tokenizer.get_vocab()
    assert tokenizer_digest(other) != digest
