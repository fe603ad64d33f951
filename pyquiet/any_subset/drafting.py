"""Where drafts come from: what a drafter is told, and the context n-gram of arXiv 2504.20456."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """What a drafter may look at. b sequences, N positions, k drafts.

    Attributes:
        tokens: int64 [b, N]; only those at `known` positions mean anything.
        known: bool [b, N], the decided positions.
        positions: int64 [b, k] of the drafts, in the order of filling; -1: none, in a text that ends before.
        draw: logits [b, V] -> tokens int64 [b], the next drafts, drawn from them under the law's processing.
    """

    tokens: Tensor
    known: Tensor
    positions: Tensor
    draw: Callable[[Tensor], Tensor]


# Returns logits [b, k, V], from which the drafts are then drawn independently; or None, having drawn all k with
# `context.draw`, each perhaps with a look at those before it.
Drafter = Callable[[Context], Tensor | None]


def ngram_drafter(vocab_size: int, banned: Tensor | None = None) -> Drafter:
    """Drafts each token by its left neighbour: by the bigrams of the known tokens, else by their frequencies.

    The left neighbour may be a draft itself. With nothing known, or nothing that is not `banned`, all tokens are equal.
    """

    def draft(context: Context) -> None:
        tokens, known = context.tokens, context.known
        follows = known[:, 1:] & known[:, :-1]
        single = _counts(tokens, known, vocab_size, banned)
        filled = tokens.masked_fill(~known, -1)
        for place in context.positions.clamp(min=0).split(1, 1):
            left = filled.gather(1, (place - 1).clamp(min=0)).masked_fill(place == 0, -1)
            pair = _counts(tokens[:, 1:], follows & (tokens[:, :-1] == left), vocab_size, banned)
            law = torch.where(pair.any(1, keepdim=True), pair, single)
            law = torch.where(law.any(1, keepdim=True), law, 1).log()
            filled = filled.scatter(1, place, context.draw(law)[:, None])

    return draft


def _counts(tokens: Tensor, counted: Tensor, vocab_size: int, banned: Tensor | None) -> Tensor:
    """How often each token stands at a `counted` place, float32 [b, V]."""
    counts = torch.zeros(len(tokens), vocab_size, device=tokens.device)
    counts.scatter_add_(1, tokens.masked_fill(~counted, 0), counted.float())
    return counts if banned is None else counts.masked_fill(banned, 0)
