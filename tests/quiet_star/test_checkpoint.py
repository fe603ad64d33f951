"""A thinking model survives save and load bit for bit, by its own class and by the Auto classes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import pyquiet

from .architectures import VOCABULARY, build
from .thinkers import awake, random_ids, thinker

LOADERS = {
    "own class": pyquiet.QuietStarForCausalLM.from_pretrained,
    "auto class": AutoModelForCausalLM.from_pretrained,
}


def assert_same_model(actual, expected, attention="sdpa"):
    old, new = expected.state_dict(), actual.state_dict()
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert new[name].dtype == tensor.dtype, name
        assert torch.equal(new[name], tensor), name
    assert isinstance(actual, pyquiet.QuietStarForCausalLM)
    assert type(actual.base) is type(expected.base)
    assert actual.base.config._attn_implementation == attention


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "cohere"])
@torch.no_grad()
def test_weights_and_words_come_back(loader, name, tmp_path):
    attention = "eager" if name == "gemma2" else "sdpa"
    model = thinker(name, m=3, dtype=torch.float32, attention=attention)
    ids = random_ids(2, 5)
    options = {
        "max_new_tokens": 6,
        "seed": 3,
        "do_sample": True,
        "return_thoughts": True,
        "return_dict_in_generate": True,
    }
    said = model.generate(ids, **options)
    model.save_pretrained(tmp_path)
    loaded = LOADERS[loader](tmp_path, attn_implementation=attention).eval()
    assert_same_model(loaded, model, attention)
    again = loaded.generate(ids, **options)
    assert torch.equal(again.sequences, said.sequences)
    assert torch.equal(again.thoughts.tokens, said.thoughts.tokens)
    assert torch.equal(again.thoughts.weight, said.thoughts.weight)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_tied_weights_stay_tied(tied, tmp_path):
    model = thinker(dtype=torch.float32, attention="sdpa", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    base = pyquiet.QuietStarForCausalLM.from_pretrained(tmp_path).base
    table, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    assert (head.data_ptr() == table.data_ptr()) == tied
    assert torch.equal(head, model.base.get_output_embeddings().weight)


@pytest.mark.parametrize("loader", LOADERS)
@torch.no_grad()
def test_float64_comes_back(loader, tmp_path):
    model = thinker(dtype=torch.float64, attention="sdpa")
    model.save_pretrained(tmp_path)
    assert_same_model(LOADERS[loader](tmp_path), model)


@pytest.mark.parametrize("loader", LOADERS)
@torch.no_grad()
def test_a_model_cast_to_bf16_comes_back(loader, tmp_path):
    """The base stays in bf16; what mixes may come back in float32, with the same values."""
    model = thinker(dtype=torch.float32, attention="sdpa").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = LOADERS[loader](tmp_path)
    assert {parameter.dtype for parameter in loaded.base.parameters()} == {torch.bfloat16}
    old, new = model.state_dict(), loaded.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.equal(new[name].float(), old[name].float()) for name in old)


@torch.no_grad()
def test_a_bf16_base_saves_and_loads(tmp_path):
    model = thinker(dtype=torch.bfloat16, attention="sdpa")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_model(loaded, model)


@torch.no_grad()
def test_the_config_comes_back(tmp_path):
    model = thinker(m=4, attention="sdpa")
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config)
    assert config.thought_tokens == 4
    assert config.embedding_scale == 100
    path = {"_name_or_path": ""}
    assert config.to_dict() | path == model.config.to_dict() | path
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.temperature == 0.5
    assert loaded.base.config.to_dict() == model.base.config.to_dict()


def test_nothing_is_pickled(tmp_path):
    thinker(attention="sdpa").save_pretrained(tmp_path)
    endings = {path.suffix for path in tmp_path.iterdir()}
    assert ".safetensors" in endings
    assert endings <= {".safetensors", ".json"}


@torch.no_grad()
def test_trained_start_and_end_are_not_reset_by_use(tmp_path):
    """The released code overwrites both on the first forward of every process."""
    model, ids = thinker(dtype=torch.float32, attention="sdpa"), random_ids(1, 4)
    kept = [tensor.clone() for tensor in (model.start_embedding, model.end_embedding)]
    model.save_pretrained(tmp_path)
    loaded = pyquiet.QuietStarForCausalLM.from_pretrained(tmp_path)
    loaded.think_at_every_token(ids, seed=1)
    loaded.generate(ids, max_new_tokens=2, seed=1)
    assert torch.equal(loaded.start_embedding, kept[0])
    assert torch.equal(loaded.end_embedding, kept[1])


@torch.no_grad()
def test_an_official_model_comes_back(tmp_path):
    model = thinker(dtype=torch.float32, attention="sdpa", official=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_same_model(loaded, model)
    ids = random_ids(1, 4)
    assert torch.equal(loaded(ids, seed=1).logits, model(ids, seed=1).logits)


@torch.no_grad()
def test_saving_again_gives_the_same_files(tmp_path):
    thinker(attention="sdpa").save_pretrained(tmp_path / "first")
    loaded = pyquiet.QuietStarForCausalLM.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    first = (tmp_path / "first" / "model.safetensors").read_bytes()
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize("who", ["model", "base"])
def test_a_vocabulary_that_has_grown_comes_back(who, tmp_path):
    base = build("llama", dtype=torch.float32, attention="sdpa")
    model = awake(pyquiet.QuietStarForCausalLM.from_base(base))
    (model if who == "model" else model.base).resize_token_embeddings(VOCABULARY + 21)
    model.save_pretrained(tmp_path)
    loaded = pyquiet.QuietStarForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(1, 4)
    assert torch.equal(loaded(ids, seed=0).logits, model(ids, seed=0).logits)
    assert loaded.logits_size == VOCABULARY + 21
