"""The door of any-subset functions: what texts they take, and what is wrong with others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyquiet.any_subset.engine import Engine
from pyquiet.any_subset.order import order_from_mask


@dataclass(frozen=True)
class Inputs:
    """Texts in their orders, int64 on the CPU: order [B, N], prompt [B] and total [B], the positions less padding."""

    order: Tensor
    prompt: Tensor
    total: Tensor

    def target_ranks(self) -> Tensor:
        """The ranks to fill of each text, [B, most of them]; -1 where it has fewer."""
        width = int((self.total - self.prompt).max()) if len(self.total) else 0
        ranks = self.prompt[:, None] + torch.arange(width)
        return ranks.masked_fill(ranks >= self.total[:, None], -1)


def read_inputs(
    engine: Engine,
    input_ids: Tensor,
    known: Tensor,
    attention_mask: Tensor | None,
    order: Tensor | None,
    *,
    mask_name: str = "known",
    filled: bool = False,
) -> Inputs:
    """The orders of a batch, checked; of `filled` texts all tokens. `mask_name` is what the caller calls the mask.

    Raises:
        TypeError, ValueError: an argument does not fit the others; a given token is outside the vocabulary.
    """
    for name, value in (
        ("input_ids", input_ids),
        (mask_name, known),
        ("attention_mask", attention_mask),
        ("order", order),
    ):
        if not isinstance(value, Tensor) and not (value is None and name in ("attention_mask", "order")):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if engine.training:
        raise ValueError("model is in training mode, where dropout changes its law; call model.eval()")
    if input_ids.device != engine.device or known.device != engine.device:
        raise ValueError(
            f"input_ids and {mask_name} must be on the model's device, {engine.device}; they are on {input_ids.device} "
            f"and {known.device}"
        )
    if input_ids.dtype != torch.int64 or input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must be int64 [B, N] with B and N at least 1, got {input_ids.dtype} {list(input_ids.shape)}"
        )
    if known.dtype != torch.bool or known.shape != input_ids.shape:
        raise ValueError(
            f"{mask_name} must be bool of the shape of input_ids, {list(input_ids.shape)}, got {known.dtype} "
            f"{list(known.shape)}"
        )
    real = torch.ones_like(known) if attention_mask is None else attention_mask != 0
    if real.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {list(input_ids.shape)}, got {list(real.shape)}"
        )
    if attention_mask is not None and not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError(
            "attention_mask must hold 1 at tokens and 0 at padding, got others; a mask that is added to scores is none"
        )
    if not real.any(1).all():
        raise ValueError(f"attention_mask hides all of text {int((~real.any(1)).nonzero()[0])}; leave it out")
    given = input_ids[real if filled else known & real]
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < engine.vocab_size:
        wrong = given[(given < 0) | (given >= engine.vocab_size)][0]
        raise ValueError(
            f"input_ids holds the token {int(wrong)}, which is outside the vocabulary of {engine.vocab_size}"
        )
    known, real = known.cpu(), real.cpu()
    found, prompt = order_from_mask(known, real)
    assert isinstance(prompt, Tensor)
    total = real.sum(1)
    return Inputs(found if order is None else _checked(order.cpu(), found, prompt, total), prompt, total)


def _checked(order: Tensor, found: Tensor, prompt: Tensor, total: Tensor) -> Tensor:
    if order.dtype != torch.int64 or order.shape != found.shape:
        raise ValueError(
            f"order must be int64 {list(found.shape)}, rank to position, got {order.dtype} {list(order.shape)}"
        )
    for row, (mine, theirs) in enumerate(zip(order, found, strict=True)):
        m, n = int(prompt[row]), int(total[row])
        for what, part in (("given", slice(m)), ("to be filled", slice(m, n)), ("padding", slice(n, None))):
            if not torch.equal(mine[part].sort().values, theirs[part].sort().values):
                raise ValueError(
                    f"order: text {row} must name the positions that are {what}, {theirs[part].tolist()}, at ranks "
                    f"{part.start or 0} to {len(mine) if part.stop is None else part.stop}, got {mine[part].tolist()}"
                )
    return order
