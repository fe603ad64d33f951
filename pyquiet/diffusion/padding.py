"""Where texts [B, T] have tokens: the attention masks of padding, on either side, as all of diffusion reads them."""

import torch
from torch import Tensor


def where_real(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Where the texts are no padding, bool [B, T]; everywhere without a mask."""
    return torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0


def places_of(real: Tensor) -> Tensor:
    """The number of each column int64 [B, T] among those of its text that are no padding, bool [B, T]."""
    return (real.long().cumsum(1) - 1).clamp(min=0)


def leftward(keep: Tensor) -> Tensor:
    """The places int64 [B, T] that gather each row's kept positions, bool [B, T], to its left, in their order."""
    return (~keep).byte().argsort(dim=1, stable=True)
