"""Named model shapes for the benches: Llama and XLNet configurations with random weights.

Speed does not depend on the values of the weights; nothing here says anything about quality.
"""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, XLNetConfig, XLNetLMHeadModel

import pyquiet

SHAPES: dict[str, LlamaConfig] = {
    # Small enough for training steps of the Quiet-STaR release: one key head a query head, so it repeats none.
    "llama-1m": LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
    # The shape of the well-known 15M stories model.
    "llama-15m": LlamaConfig(
        vocab_size=32000,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    ),
}

# Two-stream models of one shape with many words, and with the 256 bytes, where the head costs nothing.
XLNETS: dict[str, XLNetConfig] = {
    name: XLNetConfig(vocab_size=vocabulary, d_model=256, n_layer=6, n_head=4, d_inner=1024)
    for name, vocabulary in (("xlnet-6l", 32000), ("xlnet-6l-bytes", 256))
}


def random_xlnet(name: str, seed: int = 0) -> XLNetLMHeadModel:
    """Return the named two-stream shape in evaluation mode, float32, weights from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return XLNetLMHeadModel(XLNETS[name]).eval()


def random_model(name: str, seed: int = 0) -> LlamaForCausalLM:
    """Return the named shape in evaluation mode, float32, weights from `seed`.

    It has no end-of-text token, so generation always runs to the length that is asked for.

    Raises:
        ValueError: no shape has this name.
    """
    if name not in SHAPES:
        raise ValueError(f"name is {name!r}; known shapes are {', '.join(SHAPES)}")
    config = LlamaConfig.from_dict(SHAPES[name].to_dict())
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.eval()


def random_thinker(name: str, **options: Any) -> Any:
    """Return a thinking model on a random base, with w other than 0 and an END other than START.

    `options` are those of `QuietStarForCausalLM.from_base`.
    """
    model = pyquiet.QuietStarForCausalLM.from_base(random_model(name), start_init=7, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.mixing_head[-1].weight.normal_(std=1.0, generator=generator)
        model.end_embedding.normal_(std=2e-4, generator=generator)
    return model.eval()
