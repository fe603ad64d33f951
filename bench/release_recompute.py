"""The next token as the Quiet-STaR release computes it: the training forward, for every token anew.

A thought is computed after every position of the prefix, in passes of S tokens whose keys grow by
S and whose mask is dense (arXiv 2403.09629, section 4.2); only the last one is used. Kept in its
best form: thoughts are argmax (no noise over S x V), logits are made only where a token is chosen,
the mask is one buffer, and the two vocabulary projections a pass of the release are one.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass(frozen=True)
class NextToken:
    """What one recompute gives: `logits` [V] of the next token, mixed with `weight`.

    `tokens` [S, m] are the thoughts after every position, `token_passes` the tokens that went
    through the network.
    """

    logits: Tensor
    weight: float
    tokens: Tensor
    token_passes: int


@torch.no_grad()
def next_token(model: Any, input_ids: Tensor, thoughts: Tensor | None = None) -> NextToken:
    """Return the mixed logits after the text [S] of a `QuietStarForCausalLM`.

    Args:
        thoughts: [S, m], tokens to use instead of the most probable ones.
    """
    base, m, size = model.base, model.config.thought_tokens, len(input_ids)
    network, head = base.base_model, base.get_output_embeddings()
    embed = base.get_input_embeddings()
    masks, cache = growing_mask(size, m + 3), DynamicCache(config=base.config)
    positions, passes = torch.arange(size), 0

    def forward(embeddings: Tensor) -> Tensor:
        nonlocal passes
        mask = masks[None, None, :, : (passes + 1) * size]
        where = (positions + passes)[None]
        passes += 1
        return network(
            inputs_embeds=embeddings[None], attention_mask=mask, position_ids=where,
            past_key_values=cache, use_cache=True,
        ).last_hidden_state[0]  # fmt: skip

    scale = model.config.embedding_scale
    base_states = forward(embed(input_ids))
    states = forward((scale * model.start_embedding).expand(size, -1))
    chosen = []
    for step in range(m):
        token = head(states).argmax(-1) if thoughts is None else thoughts[:, step]
        chosen.append(token)
        states = forward(embed(token))
    states = forward((scale * model.end_embedding).expand(size, -1))
    last, thought = base_states[-1], states[-1]
    weight = model.mixing_head(torch.cat([last, thought])[None, None]).reshape(())
    logits = head((1 - weight) * last + weight * thought).float()
    return NextToken(logits, weight.item(), torch.stack(chosen, -1), passes * size)


def growing_mask(size: int, passes: int) -> Tensor:
    """Return the additive mask [S, passes * S]: causal text, then a diagonal for every pass."""
    eye = torch.eye(size, dtype=torch.bool)
    visible = torch.cat([torch.ones_like(eye).tril(), eye.repeat(1, passes - 1)], 1)
    return torch.zeros(visible.shape).masked_fill(~visible, -math.inf)
