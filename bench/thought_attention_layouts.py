"""The layouts and masks of the thought attention baselines; letters as in `thought_attention_baselines`."""

import math

import torch
from torch import Tensor

from .thought_attention_problem import Inputs, Shape


def packed_keys(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return keys and values [B, G, T + T*P, D], the text first, then paths by position."""
    k = torch.cat([inputs.text_key, inputs.path_key.flatten(2, 3)], 2)
    return k, torch.cat([inputs.text_value, inputs.path_value.flatten(2, 3)], 2)


def step_major(text: Tensor, path: Tensor) -> Tensor:
    """Return [B, G, (1 + P) T, D]: the text, then all positions of step 1, of step 2, ..."""
    return torch.cat([text, path.transpose(2, 3).flatten(2, 3)], 2)


def position_rows(inputs: Inputs) -> Tensor:
    """Return the query as [N, T, R, D]: all rows that share a position and a key head together."""
    s = inputs.shape
    q = inputs.query.unflatten(1, (s.kv_heads, -1))  # [B, G, H/G, T, P, D]
    return q.transpose(2, 3).reshape(s.batch * s.kv_heads, s.positions, s.rows, s.head_size)


def from_rows(out: Tensor, s: Shape) -> Tensor:
    """Return [N, T, R, D] as [B, H, T, P, D]."""
    out = out.reshape(s.batch, s.kv_heads, s.positions, -1, s.steps, s.head_size)
    return out.transpose(2, 3).flatten(1, 2)


def blocked_keys(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return text keys [N, D, T], text values [N, T, D], path keys and values [N, T, P, D]."""
    keys = inputs.text_key.flatten(0, 1).mT.contiguous()
    values = inputs.text_value.flatten(0, 1)
    return keys, values, inputs.path_key.flatten(0, 1), inputs.path_value.flatten(0, 1)


def additive(visible: Tensor, like: Tensor) -> Tensor:
    """Return 0 where visible and -inf elsewhere, as SDPA makes it of a bool mask; in the dtype and place of `like`."""
    mask = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    return mask.masked_fill(~visible.to(like.device), -math.inf)


def diagonal_mask(block: int, r: int, like: Tensor) -> Tensor:
    """Return the additive mask [block * R, block] of a block's rows against its own positions."""
    return additive(torch.ones(block, block, dtype=torch.bool).tril(), like).repeat_interleave(r, 0)


def step_mask(r: int, p: int, like: Tensor) -> Tensor:
    """Return the additive mask [R, P] of a position's rows against its own path."""
    return additive(torch.ones(p, p, dtype=torch.bool).tril(), like).repeat(r // p, 1)
