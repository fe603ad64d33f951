"""Checkpoints in the layout of the released code, made here with random numbers, become thinking models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from pyquiet.quiet_star.conversion import convert_released, load_released

from .architectures import EXACT, build
from .thinkers import random_ids

D, V = 64, 101
FLAGS = {
    "max_thoughts": 13,
    "merged_talk_heads": True,
    "merged_lm_and_talk_heads": False,
    "merged_lm_and_think_heads": True,
    "use_concat_talk_head": True,
    "use_shallow_think": True,
    "use_shallow_talk": False,
    "use_complex_think_head": False,
    "use_complex_talk_head": True,
    "use_weighted_talk_head": True,
}


def released(name="mistral", *, dtype=torch.float32, **changes):
    """A state dict and a config.json in the released layout."""
    base = build(name, dtype=dtype, attention="sdpa", vocab_size=V, **changes)
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    if base.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    generator = torch.Generator().manual_seed(5)

    def random(*shape, scale):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    for token in ("start_embedding", "end_embedding"):
        weights[token] = random(2, D, scale=0.003)
    for layer, (rows, columns) in {0: (D, 2 * D), 2: (D, D), 4: (1, D)}.items():
        weights[f"talk_head.0.{layer}.weight"] = random(rows, columns, scale=columns**-0.5)
        if layer < 4:
            weights[f"talk_head.0.{layer}.bias"] = random(rows, scale=0.1)
    config = base.config.to_dict() | FLAGS | {"torch_dtype": "bfloat16", "auto_map": {"AutoConfig": "elsewhere.Config"}}
    # As files of that age have it.
    return weights, config | {"rope_theta": config.pop("rope_parameters")["rope_theta"]}


def write(folder, weights, config, shards=1):
    """The folder of a released checkpoint with safetensors."""
    (folder / "config.json").write_text(json.dumps(config))
    names, index = sorted(weights), {}
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: weights[name] for name in names[i::shards]}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names[i::shards], file)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def blank(path):
    """Zeros in place of a file's bytes: a model that maps it would see them."""
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def assert_holds(model, weights):
    """Every number of the release is in the model, bit for bit, and nothing else is."""
    ours = model.state_dict()
    if model.config.tie_word_embeddings:
        assert ours["base.lm_head.weight"].data_ptr() == ours["base.model.embed_tokens.weight"].data_ptr()
        weights = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    assert len(ours) == len(weights)
    for name, value in weights.items():
        if name in ("start_embedding", "end_embedding"):
            actual, value = ours[name], value[0]
        elif name.startswith("talk_head.0."):
            actual = ours["mixing_head." + name.removeprefix("talk_head.0.")]
        else:
            actual = ours["base." + name]
            assert actual.dtype == value.dtype, name
        assert torch.equal(actual, value.to(actual.dtype)), name


def mixed_logits(weights, ids, thought):
    """Logits [V] after `ids` [S] and the thought's tokens [m], computed from the released tensors alone."""
    config = MistralConfig(
        vocab_size=V,
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=96,
        sliding_window=6,
    )
    network = MistralForCausalLM._from_config(config, attn_implementation=EXACT, dtype=torch.float64).eval()
    network.load_state_dict({key: value for key, value in weights.items() if key.startswith(("model.", "lm_head."))})
    table, lm_head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]

    def last(rows):
        return network.model(inputs_embeds=rows[None], use_cache=False).last_hidden_state[0, -1]

    start, end = 100 * weights["start_embedding"][:1], 100 * weights["end_embedding"][:1]
    before, after = last(table[ids]), last(torch.cat([table[ids], start, table[thought], end]))
    x = torch.cat([before, after])
    for layer in (0, 2):
        x = functional.linear(x, weights[f"talk_head.0.{layer}.weight"], weights[f"talk_head.0.{layer}.bias"]).relu()
    w = weights["talk_head.0.4.weight"] @ x
    return (1 - w) * (lm_head @ before) + w * (lm_head @ after), w


@pytest.mark.parametrize("n_ahead", [3, 5])
@torch.no_grad()
def test_predicts_what_the_released_tensors_say(n_ahead):
    weights, config = released(dtype=torch.float64)
    model = convert_released(weights, config, n_ahead=n_ahead, attn_implementation=EXACT)
    ids = random_ids(1, 9)
    thoughts = model.think_at_every_token(ids, seed=4)
    logits = model(ids, seed=4).logits
    assert thoughts.tokens.shape == (1, 9, 1, n_ahead - 3)
    for i in range(9):
        expected, w = mixed_logits(weights, ids[0, : i + 1], thoughts.tokens[0, i, 0])
        torch.testing.assert_close(logits[0, i], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(thoughts.weight[0, i], w, rtol=0, atol=1e-12)
    assert thoughts.weight.abs().min() > 1e-3


@torch.no_grad()
def test_start_and_end_are_the_last_two_rows_and_never_sampled():
    weights, config = released()
    weights["lm_head.weight"][-2:] = weights["lm_head.weight"][3]  # as likely as any token
    model = convert_released(weights, config, n_ahead=8)
    assert model.config.official
    assert model.config.reserved_ids == [V - 2, V - 1]
    thoughts = model.think_at_every_token(random_ids(2, 8), seed=1, thoughts_per_token=8)
    assert thoughts.tokens.max() < V - 2
    assert torch.isfinite(model(random_ids(1, 4), seed=1).logits[..., -2:]).all()


@pytest.mark.parametrize(
    ("name", "changes"),
    [("mistral", {}), ("qwen2", {}), ("qwen2", {"tie_word_embeddings": True})],
    ids=["mistral", "qwen2", "tied"],
)
def test_numbers_in_are_numbers_out(name, changes):
    weights, config = released(name, dtype=torch.bfloat16, **changes)
    before = {key: value.clone() for key, value in weights.items()}
    model = convert_released(weights, config, n_ahead=8)
    assert type(model.base).__name__ == {"mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}[name]
    assert_holds(model, weights)
    assert {model.mixing_head[0].weight.dtype, model.start_embedding.dtype} == {torch.float32}
    assert not model.training
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[key], value) for key, value in before.items())
    assert config["max_thoughts"] == 13
    left = model.config.base_config.to_dict().keys()
    assert left.isdisjoint(FLAGS)
    assert "auto_map" not in left
    assert model.config.base_config.sliding_window == (6 if name == "mistral" else None)


def test_a_dtype_can_be_asked_for():
    weights, config = released()
    model = convert_released(weights, config, n_ahead=8, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.base.parameters()} == {torch.bfloat16}
    assert torch.equal(model.mixing_head[0].weight, weights["talk_head.0.0.weight"])
    assert torch.equal(model.end_embedding, weights["end_embedding"][0])


@pytest.mark.parametrize("shards", [1, 3])
@torch.no_grad()
def test_a_folder_comes_in_and_goes_out_as_ours(shards, tmp_path):
    weights, config = released(dtype=torch.bfloat16)
    write(tmp_path, weights, config, shards)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.25, "do_sample": true}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"safetensors come first")
    model = load_released(str(tmp_path), n_ahead=4)
    for path in tmp_path.glob("*.safetensors"):
        blank(path)
    assert_holds(model, weights)
    assert model.generation_config.temperature == 0.25
    model.save_pretrained(tmp_path)  # over the files it came from
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_holds(loaded, weights)
    ids = random_ids(1, 5)
    assert torch.equal(loaded(ids, seed=3).logits, model(ids, seed=3).logits)
    assert loaded.config.thought_tokens == 1


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pickled_checkpoint(shards, tmp_path):
    weights, config = released(dtype=torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    files = [f"part{i}.bin" for i in range(shards)] if shards > 1 else ["pytorch_model.bin"]
    for i, file in enumerate(files):
        torch.save({name: weights[name] for name in names[i::shards]}, tmp_path / file)
    if shards > 1:
        index = {name: files[i % shards] for i, name in enumerate(names)}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    model = load_released(tmp_path, n_ahead=8)
    for file in files:
        blank(tmp_path / file)
    assert_holds(model, weights)


def test_a_torn_file_and_a_pickle_with_more_than_tensors_are_refused(tmp_path):
    weights, config = released()
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(weights | {"start_embedding": AutoModelForCausalLM}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: no weights can be read"):
        load_released(tmp_path, n_ahead=8)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"model\.safetensors: no weights can be read"):
        load_released(tmp_path, n_ahead=8)


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_released(tmp_path, n_ahead=8)
    (tmp_path / "config.json").write_text(json.dumps(released()[1]))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_released(tmp_path, n_ahead=8)


def test_n_ahead_comes_from_the_argument_or_the_configuration():
    weights, config = released()
    with pytest.raises(ValueError, match=r"n_ahead must be given.*max_thoughts=13"):
        convert_released(weights, config)
    assert convert_released(weights, config | {"n_ahead": 6}).config.thought_tokens == 3
    assert convert_released(weights, config | {"n_ahead": 6}, n_ahead=8).config.thought_tokens == 5
    assert convert_released(weights, MistralConfig(**config), n_ahead=8).config.thought_tokens == 5
    with pytest.raises(ValueError, match="n_ahead must be at least 3, got 1"):
        convert_released(weights, config, n_ahead=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama"},
        {"merged_talk_heads": False},
        {"merged_lm_and_talk_heads": True},
        {"use_concat_talk_head": False},
        {"use_complex_talk_head": False},
        {"use_weighted_talk_head": False},
        {"use_shallow_talk": True},
        {"use_reparam_for_thought_embeddings": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_unsupported_settings_are_named(changes):
    weights, config = released()
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"{name}.*{value}.*not supported"):
        convert_released(weights, config | changes, n_ahead=8)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("talk_head.0.2.bias", None, r"lacks talk_head\.0\.2\.bias"),
        ("end_embedding", None, "lacks end_embedding"),
        ("lm_head.weight", None, r"lacks lm_head\.weight"),
        ("model.layers.1.mlp.up_proj.weight", None, r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        ("talk_head.1.0.weight", (D, 2 * D), r"unknown keys, talk_head\.1\.0\.weight.*one mixing head"),
        ("talk_head.0.4.bias", (1,), r"unknown keys, talk_head\.0\.4\.bias"),
        ("mixing_head.0.weight", (D, 2 * D), r"unknown keys, mixing_head\.0\.weight"),
        ("start_embedding", (D,), r"start_embedding has shape \[64\], not \[2, 64\]"),
        ("talk_head.0.4.weight", (D, D), r"talk_head\.0\.4\.weight has shape \[64, 64\], not \[1, 64\]"),
        ("model.embed_tokens.weight", (V - 2, D), r"embed_tokens\.weight has shape \[99, 64\], not \[101, 64\]"),
    ],
)
def test_wrong_keys_and_shapes_are_named(key, shape, message):
    weights, config = released()
    if shape is None:
        del weights[key]
    else:
        weights[key] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        convert_released(weights, config, n_ahead=8)
