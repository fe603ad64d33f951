"""Small random XLNets, and transformers' own evaluation of them, full and without a cache."""

import torch
from torch import Tensor
from transformers import XLNetConfig, XLNetLMHeadModel


def random_xlnet(vocabulary: int = 11, seed: int = 0, scale: float = 1.5, **options: object) -> XLNetLMHeadModel:
    """A model with weights large enough that every input matters."""
    sizes = {"d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = XLNetLMHeadModel(XLNetConfig(vocab_size=vocabulary, **(sizes | options)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layer_norm" not in name:
                    parameter.normal_(std=scale / parameter.shape[0] ** 0.5 if parameter.ndim > 1 else 1.0)
    return model.eval()


@torch.no_grad()
def transformers_logits(
    model: XLNetLMHeadModel, tokens: Tensor, order: Tensor, prompt: int, position: int, sees: int
) -> Tensor:
    """Logits [V] at a position that sees the first `sees` ranks of one text [N], by perm_mask and target_mapping."""
    N = len(tokens)
    hidden = torch.ones(N, N)
    for rank, i in enumerate(order.tolist()):
        seen = prompt if rank < prompt else rank + 1
        hidden[i, order[:seen]] = 0
    # The query row of `position` replaces its content row, which it does not see.
    hidden[position] = 1
    hidden[position, order[:sees]] = 0
    mapping = torch.zeros(1, 1, N)
    mapping[0, 0, position] = 1
    out = model(tokens[None], perm_mask=hidden[None], target_mapping=mapping, use_mems=False)
    return out.logits[0, 0]
