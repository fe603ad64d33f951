"""What a user would otherwise write for thought attention, each in the best form we know.

Every method lays its inputs out as it likes them best before the clock starts, and hands its
result back in its own layout. Shared letters: B batch, H query heads, G key heads, T positions,
P path steps, D head size, N = B * G, R = (H / G) * P query rows a position, of which row r is
step r % P. Queries are packed position by position: row t * R + r.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# The dense masks grow with (T * P)^2: above this many scores a method is left out, about a second.
MAX_DENSE_SCORES = 2**29


@dataclass(frozen=True)
class Shape:
    """One problem size of thought attention over a whole text."""

    positions: int
    steps: int
    batch: int = 2
    heads: int = 8
    kv_heads: int = 8
    head_size: int = 64

    @property
    def name(self) -> str:
        grouped = "" if self.kv_heads == self.heads else f"-G{self.kv_heads}"
        return f"T{self.positions}-P{self.steps}{grouped}"

    @property
    def rows(self) -> int:
        """Query rows that share one position and one key head: R."""
        return self.heads // self.kv_heads * self.steps

    @property
    def useful_flops(self) -> int:
        """4 D per (query, key) pair that the mask lets through; exp and scaling not counted."""
        t, p = self.positions, self.steps
        pairs = p * t * (t + 1) // 2 + t * p * (p + 1) // 2
        return 4 * self.head_size * pairs * self.batch * self.heads

    @property
    def dense_scores(self) -> int:
        t, p = self.positions, self.steps
        return self.batch * self.heads * t * p * (t + t * p)

    @property
    def stepwise_scores(self) -> int:
        t, p = self.positions, self.steps
        return self.batch * self.heads * t * t * p * (p + 3) // 2


@dataclass(frozen=True)
class Inputs:
    """The arguments of `pyquiet.kernels.thought_attention` in the layout of its contract."""

    shape: Shape
    query: Tensor  # [B, H, T, P, D]
    text_key: Tensor  # [B, G, T, D]
    text_value: Tensor  # [B, G, T, D]
    path_key: Tensor  # [B, G, T, P, D]
    path_value: Tensor  # [B, G, T, P, D]
    text_limits: Tensor  # [B, T]

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.shape.head_size)


@dataclass(frozen=True)
class Method:
    """A prepared baseline: `run()` is what is timed, `unpack` brings its result to [B,H,T,P,D]."""

    run: Callable[[], Any]
    unpack: Callable[[Any], Tensor]


def random_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """Return standard normal inputs in which position i sees the text up to and with itself."""
    generator = torch.Generator().manual_seed(seed)
    b, h, g, t = shape.batch, shape.heads, shape.kv_heads, shape.positions
    p, d = shape.steps, shape.head_size

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    limits = torch.arange(1, t + 1).expand(b, t).contiguous()
    text_key, text_value = normal(b, g, t, d), normal(b, g, t, d)
    path_key, path_value = normal(b, g, t, p, d), normal(b, g, t, p, d)
    return Inputs(shape, normal(b, h, t, p, d), text_key, text_value, path_key, path_value, limits)


def additive(visible: Tensor) -> Tensor:
    """Return 0 where visible and -inf elsewhere: what SDPA makes of a bool mask in every call."""
    return torch.zeros(visible.shape).masked_fill(~visible, -math.inf)


def dense(inputs: Inputs) -> Method:
    """One SDPA call with a [T*P, T+T*P] mask over text and all paths."""
    s = inputs.shape
    t, p = s.positions, s.steps
    row, key = torch.arange(t * p)[:, None], torch.arange(t + t * p)[None]
    mask = additive(path_mask(t, p)(None, None, row, key))
    q = inputs.query.flatten(2, 3)
    k, v = packed_keys(inputs)
    grouped = s.heads != s.kv_heads
    return Method(
        run=lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped),
        unpack=lambda out: out.view(inputs.query.shape),
    )


def stepwise(inputs: Inputs) -> Method:
    """P SDPA calls whose keys and mask grow by T each: the passes of the Quiet-STaR release.

    The release appends to its keys and its mask in every pass; here both are views of one buffer.
    """
    s = inputs.shape
    t, p = s.positions, s.steps
    q = inputs.query.transpose(2, 3).contiguous()  # [B, H, P, T, D]
    k = step_major(inputs.text_key, inputs.path_key)  # [B, G, (1 + P) T, D]
    v = step_major(inputs.text_value, inputs.path_value)
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    mask = additive(torch.cat([causal, torch.eye(t, dtype=torch.bool).repeat(1, p)], 1))
    grouped = s.heads != s.kv_heads

    def run() -> list[Tensor]:
        outs = []
        for step in range(p):
            n = (step + 2) * t
            keys, values, seen = k[:, :, :n], v[:, :, :n], mask[:, :n]
            outs.append(
                functional.scaled_dot_product_attention(q[:, :, step], keys, values, attn_mask=seen, enable_gqa=grouped)
            )
        return outs

    return Method(run, unpack=lambda outs: torch.stack(outs, 3))


def flex(inputs: Inputs, block_size: int) -> Method:
    """Compiled FlexAttention on the packed rows; the block mask is made before the clock starts."""
    s = inputs.shape
    mask = path_block_mask(s.positions, s.steps, block_size)
    q = inputs.query.flatten(2, 3)
    k, v = packed_keys(inputs)
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = s.heads != s.kv_heads
    return Method(
        run=lambda: compiled(q, k, v, block_mask=mask, enable_gqa=grouped),
        unpack=lambda out: out.view(inputs.query.shape),
    )


def decomposition(inputs: Inputs) -> Method:
    """Causal flash over the text, batched products over the own paths, merged by log-sum-exp.

    The R rows of a position enter the flash kernel as R heads that share one text by stride 0.
    """
    s = inputs.shape
    n, t, p, r, d = s.batch * s.kv_heads, s.positions, s.steps, s.rows, s.head_size
    rows = position_rows(inputs)  # [N, T, R, D]
    heads = rows.transpose(1, 2).contiguous()  # [N, R, T, D]
    k = inputs.text_key.reshape(n, 1, t, d).expand(n, r, t, d)
    v = inputs.text_value.reshape(n, 1, t, d).expand(n, r, t, d)
    own_q = rows.reshape(n * t, r, d)
    own_k = inputs.path_key.reshape(n * t, p, d).transpose(1, 2)
    own_v = inputs.path_value.reshape(n * t, p, d)
    own_mask = step_mask(r, p).expand(n * t, r, p)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def run() -> Tensor:
        text, text_lse = flash(heads, k, v, 0.0, True, scale=inputs.scale)
        scores = torch.baddbmm(own_mask, own_q, own_k, alpha=inputs.scale)
        lse = scores.logsumexp(-1, keepdim=True)
        own = torch.bmm(scores.sub_(lse).exp_(), own_v).view(n, t, r, d).transpose(1, 2)
        weight = torch.sigmoid(lse.view(n, t, r).transpose(1, 2) - text_lse)
        return torch.lerp(text, own, weight.unsqueeze(-1))

    return Method(run, unpack=lambda out: from_rows(out.transpose(1, 2), s))


def blocked(inputs: Inputs) -> Method:
    """Eager softmax over [prefix | own path], block by block of positions, prefix trimmed."""
    s, block = inputs.shape, positions_a_block(inputs.shape.steps)
    n, t, p, r, d = s.batch * s.kv_heads, s.positions, s.steps, s.rows, s.head_size
    q = position_rows(inputs)
    keys, values, path_key, path_value = blocked_keys(inputs)
    text_mask, own_mask = diagonal_mask(block, r), step_mask(r, p).expand(n * block, r, p)
    nothing = torch.zeros(1, 1, 1)
    out = torch.empty(n, t, r, d)

    def run() -> Tensor:
        for i in range(0, t, block):
            j = i + block
            q_text, q_own = q[:, i:j].reshape(n, block * r, d), q[:, i:j].reshape(n * block, r, d)
            k_own, v_own = path_key[:, i:j].reshape(-1, p, d), path_value[:, i:j].reshape(-1, p, d)
            text = torch.baddbmm(nothing, q_text, keys[:, :, :j], beta=0, alpha=inputs.scale)
            text[:, :, i:] += text_mask
            own = torch.baddbmm(own_mask, q_own, k_own.mT, alpha=inputs.scale)
            own = own.view(n, block * r, p)
            top = torch.maximum(text.amax(-1, keepdim=True), own.amax(-1, keepdim=True))
            text.sub_(top).exp_()
            own.sub_(top).exp_()
            mass = text.sum(-1, keepdim=True).add_(own.sum(-1, keepdim=True))
            part = torch.bmm(text, values[:, :j])
            part += torch.bmm(own.view(-1, r, p), v_own).view(n, block * r, d)
            torch.div(part.view(n, block, r, d), mass.view(n, block, r, 1), out=out[:, i:j])
        return out

    return Method(run, unpack=lambda result: from_rows(result, s))


def compiled_blocked(inputs: Inputs) -> Method:
    """torch.compile of the blocked form, written without in-place steps so that it fuses."""
    s, block = inputs.shape, positions_a_block(inputs.shape.steps)
    n, t, p, r, d = s.batch * s.kv_heads, s.positions, s.steps, s.rows, s.head_size
    scale = inputs.scale

    def attend(
        q: Tensor, keys: Tensor, values: Tensor, path_key: Tensor, path_value: Tensor,
        text_mask: Tensor, own_mask: Tensor,
    ) -> Tensor:  # fmt: skip
        outs = []
        for i in range(0, t, block):
            j = i + block
            q_own = q[:, i:j].reshape(n * block, r, d)
            k_own, v_own = path_key[:, i:j].reshape(-1, p, d), path_value[:, i:j].reshape(-1, p, d)
            text = torch.bmm(q_own.view(n, block * r, d), keys[:, :, :j]) * scale
            text = torch.cat([text[:, :, :i], text[:, :, i:] + text_mask], -1)
            own = (torch.bmm(q_own, k_own.mT) * scale + own_mask).view(n, block * r, p)
            top = torch.maximum(text.amax(-1, keepdim=True), own.amax(-1, keepdim=True))
            text, own = (text - top).exp(), (own - top).exp()
            mass = text.sum(-1, keepdim=True) + own.sum(-1, keepdim=True)
            part = torch.bmm(own.view(-1, r, p), v_own).view(n, block * r, d)
            part = part + torch.bmm(text, values[:, :j])
            outs.append((part / mass).view(n, block, r, d))
        return torch.cat(outs, 1)

    compiled = torch.compile(attend, dynamic=False)
    arguments = (position_rows(inputs), *blocked_keys(inputs))
    masks = (diagonal_mask(block, r), step_mask(r, p))
    return Method(run=lambda: compiled(*arguments, *masks), unpack=lambda out: from_rows(out, s))


def positions_a_block(steps: int) -> int:
    """Return the fastest number of positions in a block of 8, 16, 32, 64 and 128, as measured."""
    if steps == 1:
        return 128
    return 32 if steps < 16 else 16


def path_mask(t: int, p: int) -> Callable[..., Tensor]:
    """Return the mask of packed rows against [text | paths]: earlier text, own path up to now."""

    def visible(b: object, h: object, row: Tensor, key: Tensor) -> Tensor:
        own = key - t
        return torch.where(key < t, key <= row // p, (own // p == row // p) & (own <= row))

    return visible


def path_block_mask(t: int, p: int, block: int) -> BlockMask:
    """Return FlexAttention's block mask without ever making the [T*P, T+T*P] grid.

    Text blocks below the diagonal are full; blocks on it, and own-path blocks, are partial.
    """
    if t % block or (t * p) % block:
        raise ValueError(f"block is {block}; it must divide T = {t}, or text and paths share a block")
    first = torch.arange(t * p // block)[:, None] * block  # first packed row of a query block
    last = first + block - 1
    text = torch.arange(t // block)[None] * block  # first key of a text block
    own = torch.arange(t * p // block)[None] * block
    full_text = text + block - 1 <= first // p
    any_text = text <= last // p
    any_own = (own // p <= last // p) & ((own + block - 1) // p >= first // p) & (own <= last)
    full = torch.cat([full_text, torch.zeros_like(any_own)], 1)
    partial = torch.cat([any_text, any_own], 1) & ~full

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *ordered(partial), *ordered(full), BLOCK_SIZE=block, mask_mod=path_mask(t, p),
        seq_lengths=(t * p, t + t * p),
    )  # fmt: skip


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


def diagonal_mask(block: int, r: int) -> Tensor:
    """Return the additive mask [block * R, block] of a block's rows against its own positions."""
    return additive(torch.ones(block, block, dtype=torch.bool).tril()).repeat_interleave(r, 0)


def step_mask(r: int, p: int) -> Tensor:
    """Return the additive mask [R, P] of a position's rows against its own path."""
    return additive(torch.ones(p, p, dtype=torch.bool).tril()).repeat(r // p, 1)
