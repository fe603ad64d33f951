"""The nineteen decoder architectures of the Quiet-STaR tests, tiny and with random weights.

Every model has 2 layers, width 64, 4 query heads and (where the architecture knows GQA) 2 KV heads,
V = 99. The weights are wide (std 0.2): tokens give clearly different logits and attention matters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

VOCABULARY = 99
PAD, EOS = 0, 2
CONTEXT = 96
WINDOW = 6
EXACT = "exact_softmax"

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
_LLAMA_LIKE = _COMMON | {"num_key_value_heads": 2, "intermediate_size": 96}
_MIXED_WINDOWS = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}

# name -> (model_type, configuration)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA_LIKE),
    "mistral": ("mistral", _LLAMA_LIKE | {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen3": ("qwen3", _LLAMA_LIKE | {"head_dim": 16}),
    "gpt2": ("gpt2", _COMMON),
    "gpt_neox": ("gpt_neox", _COMMON | {"intermediate_size": 96}),
    "gemma3": (
        "gemma3_text",
        _LLAMA_LIKE | _MIXED_WINDOWS | {"head_dim": 16, "query_pre_attn_scalar": 16},
    ),
    "phi": ("phi", _LLAMA_LIKE),
    "phi3": ("phi3", _LLAMA_LIKE),
    "olmo2": ("olmo2", _LLAMA_LIKE),
    "olmo3": ("olmo3", _LLAMA_LIKE | _MIXED_WINDOWS),
    "opt": ("opt", _COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "smollm3": ("smollm3", _LLAMA_LIKE | {"no_rope_layer_interval": 2}),
    "cohere": ("cohere", _LLAMA_LIKE | {"logit_scale": 0.5}),
    "granite": (
        "granite",
        _LLAMA_LIKE
        | {
            "logits_scaling": 2.0,
            "embedding_multiplier": 1.5,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
        },
    ),
    "starcoder2": ("starcoder2", _LLAMA_LIKE),
    "ernie4_5": ("ernie4_5", _LLAMA_LIKE | {"head_dim": 16}),
    "glm4": ("glm4", _LLAMA_LIKE | {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        _LLAMA_LIKE
        | _MIXED_WINDOWS
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 3.0,
        },
    ),
}

# Head sizes that are no multiple of 8, which the native kernel only takes padded.
ODD_HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_head12": (
        "llama",
        _LLAMA_LIKE | {"hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 1},
    ),
}


def exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Dense attention, its softmax in the dtype of the input (transformers has it in fp32)."""
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3)  # [B, H, T, S]
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    out = torch.softmax(scores, dim=-1) @ value
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(EXACT, exact_attention)
AttentionMaskInterface.register(EXACT, eager_mask)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Redraws every weight, wide enough that the logits of different tokens differ by order 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() >= 2:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.1 * noise)


def build(
    name: str,
    *,
    dtype: torch.dtype = torch.float64,
    attention: str = EXACT,
    seed: int = 0,
    **changes: Any,
) -> PreTrainedModel:
    """A tiny random base model in eval mode that never stops by itself (no eos for `generate`)."""
    model_type, fields = {**ARCHITECTURES, **ODD_HEADS}[name]
    config = AutoConfig.for_model(model_type, **(fields | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    randomise(model, seed)
    model.generation_config.eos_token_id = None
    return model.eval()


def explicit_logits(base: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[..., V] from final hidden states [..., d], by the published rule of each architecture."""
    logits = base.get_output_embeddings()(hidden)
    config = base.config
    if config.model_type == "cohere":
        return logits * config.logit_scale
    if config.model_type == "granite":
        return logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
