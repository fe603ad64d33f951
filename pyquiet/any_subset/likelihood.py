"""What one call gives: the joint log-probability of a filling, and the marginals of all positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyquiet.any_subset.engine import Engine, undisturbed
from pyquiet.any_subset.inputs import read_inputs
from pyquiet.heads import rows_at_once


@undisturbed
def joint_log_prob(
    model: Any, input_ids: Tensor, *, known: Tensor, attention_mask: Tensor | None = None, order: Tensor | None = None
) -> Tensor:
    """log p(the other tokens | the known ones) in nats, [B]; one call (arXiv 2504.20456).

    The sum over the tokens to fill, in their order, of the log-probability of each given all before it. The law is that
    of `infill` at temperature 1 without top-k, top-p or banned ids.

    Args:
        model: transformers' XLNetLMHeadModel, or a `pyquiet.any_subset.Engine`.
        input_ids: int64 [B, N], filled in.
        known: bool [B, N], the given positions; the prompt sees itself, but nothing else.
        attention_mask: [B, N], 0 at padding.
        order: int64 [B, N], rank to position, the known positions first; None fills from left to right.

    Raises:
        ValueError, TypeError: what is wrong with an argument, by its name.
    """
    engine: Engine = model
    inputs = read_inputs(engine, input_ids, known, attention_mask, order, filled=True)
    ranks = inputs.target_ranks()
    hidden = engine.density(engine.start(inputs.order, inputs.prompt), input_ids, ranks)
    targets = input_ids.gather(1, inputs.order.gather(1, ranks.clamp(min=0)).to(input_ids.device))
    chosen = [
        engine.head(hidden[:, part]).log_softmax(-1).gather(-1, targets[:, part, None]).squeeze(-1)
        for part in _parts(engine.vocab_size, hidden)
    ]
    if not chosen:
        return torch.zeros(len(input_ids), dtype=engine.dtype, device=input_ids.device)
    return torch.cat(chosen, 1).masked_fill(ranks.to(input_ids.device) < 0, 0).sum(1)


@undisturbed
def marginals(model: Any, input_ids: Tensor, *, known: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Log-probabilities [B, N, V] of every position that is not known, given the known ones alone; one call.

    Known positions and padding hold 0 at their token and -inf elsewhere. The tokens at positions that are not known are
    not looked at. Arguments and errors as in `joint_log_prob`.
    """
    engine: Engine = model
    inputs = read_inputs(engine, input_ids, known, attention_mask, None)
    ranks = inputs.target_ranks()
    hidden = engine.draft(engine.start(inputs.order, inputs.prompt), input_ids, inputs.prompt, ranks)
    places = inputs.order.gather(1, ranks.clamp(min=0)).to(input_ids.device)
    shape, V = input_ids.shape, engine.vocab_size
    out = torch.full((*shape, V), -torch.inf, dtype=engine.dtype, device=input_ids.device)
    out.scatter_(-1, input_ids.clamp(0, V - 1)[..., None], 0)
    for part in _parts(V, hidden):
        row, column = (ranks[:, part] >= 0).nonzero(as_tuple=True)
        out[row, places[:, part][row, column]] = engine.head(hidden[:, part]).log_softmax(-1)[row, column]
    return out


def _parts(vocab_size: int, hidden: Tensor) -> list[slice]:
    step = rows_at_once(vocab_size * len(hidden))
    return [slice(start, start + step) for start in range(0, hidden.shape[1], step)]
