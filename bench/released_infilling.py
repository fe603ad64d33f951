"""ASSD as the released code runs it: every call a full two-stream pass of transformers' XLNet over all positions.

One text, k drafts, float masks [N, N] built for each call, softmax, residual and draws by torch in eager mode. In its
best form: the first draft is accepted without a test, nothing is asserted, and only the rows that are wanted get a
query (arXiv 2504.20456).
"""

from typing import Any

import torch
from torch import Tensor


def network(model: Any, tokens: Tensor, order: Tensor, ranks: Tensor, prompt: int, known: int | None) -> Tensor:
    """Logits [len(ranks), V] at ranks that see the first `known` ranks, or where it is None all before their own."""
    N = len(tokens)
    rank_of = torch.empty_like(order)
    rank_of[order] = torch.arange(N)
    sees = rank_of.clone() if known is None else rank_of.clamp(max=known)
    sees[rank_of < prompt] = prompt
    hidden = (rank_of[None, :] >= sees[:, None]).float()
    mapping = torch.zeros(len(ranks), N)
    mapping[torch.arange(len(ranks)), order[ranks]] = 1
    logits: Tensor = model(tokens[None], perm_mask=hidden[None], target_mapping=mapping[None], use_mems=False).logits[0]
    return logits


@torch.no_grad()
def infill(
    model: Any, tokens: Tensor, order: Tensor, prompt: int, k: int, generator: torch.Generator, greedy: bool = False
) -> tuple[Tensor, int]:
    """A filled copy of `tokens` [N], and the calls of the network."""
    tokens, N, n, calls = tokens.clone(), len(tokens), prompt, 0
    while n < N:
        ranks = torch.arange(n, min(n + k, N))
        p = _law(network(model, tokens, order, ranks, prompt, n), greedy)
        drafts = torch.multinomial(p, 1, generator=generator)[:, 0]
        tokens[order[ranks]] = drafts
        calls, kept = calls + 1, 1
        if len(ranks) > 1:
            q = _law(network(model, tokens, order, ranks, prompt, None), greedy)
            calls += 1
            u = torch.rand(len(ranks), generator=generator)
            for j in range(1, len(ranks)):
                kept = j + 1
                if not u[j] * p[j, drafts[j]] < q[j, drafts[j]]:
                    residual = (q[j] - p[j]).clamp(min=0)
                    tokens[order[ranks[j]]] = torch.multinomial(residual / residual.sum(), 1, generator=generator)[0]
                    break
        n += kept
    return tokens, calls


def _law(logits: Tensor, greedy: bool) -> Tensor:
    if greedy:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return logits.softmax(-1)
