"""The order in which the positions of a text are filled: the prompt, then what is to be filled, both ascending.

Words: B sequences, N positions. `order[B, N]` maps rank to position; m is the number of given positions, so the ranks
0 .. m-1 are the prompt. Of 2^N sets of given positions each has one such order (arXiv 2504.20456).
"""

import torch
from torch import Tensor


def order_from_mask(known: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | int]:
    """The order of a text whose given positions are where `known` is True.

    Args:
        known: bool [N] or [B, N].
        attention_mask: 0 where a position is padding, which goes last; shape of `known`; None is no padding.

    Returns:
        (order, m): int64 of the shape of `known`, rank to position, and the number of given positions, an int for [N]
        and int64 [B] for [B, N].

    Raises:
        TypeError, ValueError: `known` is no bool of one of these shapes, or `attention_mask` has another one.

    >>> order_from_mask(torch.tensor([False, True, False, True]))
    (tensor([1, 3, 0, 2]), 2)
    """
    if known.dtype != torch.bool:
        raise TypeError(f"known must be a bool tensor (True: the token is given), got {known.dtype}")
    if known.ndim not in (1, 2):
        raise ValueError(f"known must have shape [N] or [B, N], got {list(known.shape)}")
    group = (~known).long()
    if attention_mask is not None:
        if attention_mask.shape != known.shape:
            raise ValueError(
                f"attention_mask must have the shape of known, {list(known.shape)}, got {list(attention_mask.shape)}"
            )
        group = group.masked_fill(attention_mask == 0, 2)
    prompt = (group == 0).sum(-1)
    return group.argsort(dim=-1, stable=True), int(prompt) if known.ndim == 1 else prompt


def ranks_of(order: Tensor) -> Tensor:
    """The inverse of `order` [B, N]: position to rank."""
    return torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1]).expand_as(order))
