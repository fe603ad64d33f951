"""Small random models in float64, and how tests ask a backend of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from pyquiet.scaling.backends.base import Generate, Prompt
from pyquiet.scaling.backends.huggingface import HFBackend

from .byte_tokens import byte_tokenizer

T = TypeVar("T")
TOKENIZER = byte_tokenizer()
SIZES: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "eos_token_id": 1,
}  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).double().eval()


def mistral() -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)).double().eval()


def gemma() -> Any:
    """Windows in every other layer, caps on scores and logits."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, sliding_window=6)).double().eval()


def deepseek() -> Any:
    """Keys and values of different sizes."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 4}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config = DeepseekV3Config(**sizes, **latent, **experts, moe_intermediate_size=16, first_k_dense_replace=2)
    return DeepseekV3ForCausalLM(config).double().eval()


def mamba() -> Any:
    """A state space: no keys and values at all."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=258, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    return MambaForCausalLM(config).double().eval()


def using(model: Any, work: Callable[[HFBackend], Awaitable[T]], **options: Any) -> T:
    """What work brings with a backend of the model."""
    return using_backend(HFBackend(model, TOKENIZER, **options), work)


def using_backend(backend: HFBackend, work: Callable[[HFBackend], Awaitable[T]]) -> T:
    """What work brings with a backend that is open."""

    async def run() -> T:
        await backend.open()
        try:
            return await work(backend)
        finally:
            await backend.close()

    return asyncio.run(run())


def ids_of(seed: int, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(2, 258, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def wants(i: int, **changes: Any) -> Generate:
    fields: dict[str, Any] = {
        "chain": f"c{i}", "prompt": Prompt(ids_of(i, 3 + 4 * (i % 5))), "max_tokens": 6 + i % 7, "temperature": 0.9,
        "top_p": 0.95, "seed": 2**62 + 977 * i,
    }  # fmt: skip
    return Generate(**(fields | changes))


@torch.no_grad()
def brute_force(model: Any, ids: tuple[int, ...], start: int) -> torch.Tensor:
    law: torch.Tensor = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return law[range(start - 1, len(ids) - 1), list(ids[start:])]
