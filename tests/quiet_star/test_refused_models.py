"""Attention that cannot carry thoughts is refused by the name of its model, never run wrongly."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import pyquiet

from . import sequential_reference as reference
from .architectures import EXACT, randomise
from .thinkers import assert_same_thoughts, awake, random_ids

_LLAMA_LIKE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# model_type -> (why, configuration)
REFUSED = {
    "bloom": ("ALiBi", {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "mpt": ("ALiBi", {"d_model": 64, "n_layers": 2, "n_heads": 4}),
    "falcon": (
        "no attention interface",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "gpt_oss": (
        "attention sinks",
        _LLAMA_LIKE | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "deepseek_v3": (
        "latent attention",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 2,
        },
    ),
    "bart": (
        "counts positions itself",
        {"d_model": 64, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96},
    ),
    "phimoe": ("keeps its window to itself", _LLAMA_LIKE | {"num_local_experts": 2, "sliding_window": 3}),
    "doge": ("masks of its own", _LLAMA_LIKE),
    "gemma3_text": ("looks ahead", _LLAMA_LIKE | {"head_dim": 16, "use_bidirectional_attention": True}),
    "diffllama": ("attends twice in a layer", _LLAMA_LIKE),
    "hrm_text": ("runs its layers again and again", _LLAMA_LIKE),
    "mamba": ("no attention", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "jamba": (
        "hybrid",
        _LLAMA_LIKE
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
}
REFUSED = {name: case for name, case in REFUSED.items() if name in CONFIG_MAPPING}  # older transformers know fewer


def build(model_type, **fields):
    config = AutoConfig.for_model(model_type, vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("model_type", REFUSED)
@torch.no_grad()
def test_a_model_that_cannot_think_is_named(model_type):
    base, ids = build(model_type, **REFUSED[model_type][1]), random_ids(1, 4)
    attention, logits = base.config._attn_implementation, base(ids).logits
    name = f"{type(base).__name__}|{type(base.base_model).__name__}"
    for use in (
        lambda model: model.think_at_every_token(ids, seed=0),
        lambda model: model.generate(ids, max_new_tokens=2, seed=0),
        lambda model: model(ids, think="always", seed=0),
    ):
        with pytest.raises((ValueError, TypeError, NotImplementedError), match=name):
            use(pyquiet.QuietStarForCausalLM.from_base(base, thought_tokens=2, start_init=7))
    assert base.config._attn_implementation == attention
    assert torch.equal(base(ids).logits, logits)


# What transformers makes of these differs between its versions.
NAMED_OR_EXACT = {
    "stablelm": ("StableLm", _LLAMA_LIKE),  # drops extra keyword arguments of `forward`
    "gptj": ("GPTJ", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),  # no interface before 5.24
}


@pytest.mark.parametrize("model_type", NAMED_OR_EXACT)
@torch.no_grad()
def test_a_model_is_named_or_exact(model_type):
    name, fields = NAMED_OR_EXACT[model_type]

    def build_base(**attention):
        config = AutoConfig.for_model(model_type, vocab_size=99, eos_token_id=2, **fields)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float64, **attention)

    try:
        base = build_base(attn_implementation=EXACT)
    except (KeyError, ValueError):  # its code knows no attention but its own
        base = build_base()
    attention = base.config._attn_implementation
    randomise(base)
    ids = random_ids(2, 5)
    logits = base.eval()(ids).logits
    try:
        model = pyquiet.QuietStarForCausalLM.from_base(base, thought_tokens=2, start_init=7)
        thoughts = awake(model).think_at_every_token(ids, seed=0)
    except (ValueError, TypeError, NotImplementedError) as error:
        assert name in str(error)  # noqa: PT017
    else:
        assert_same_thoughts(thoughts, reference.think_everywhere(model, ids, m=2), 1e-12)
    assert base.config._attn_implementation == attention
    assert torch.equal(base(ids).logits, logits)


def test_a_masked_language_model_is_refused():
    config = AutoConfig.for_model("bert", vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(NotImplementedError, match=r"BertForMaskedLM.*not a causal decoder"):
        pyquiet.QuietStarForCausalLM.from_base(AutoModelForMaskedLM.from_config(config))
