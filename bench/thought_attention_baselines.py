"""What a user would otherwise write for thought attention, each in the best form we know.

Every form lays its inputs out as it likes them best before the clock starts, and hands its result back in its own
layout. Shared letters: B batch, H query heads, G key heads, T positions, P path steps, D head size, N = B * G,
R = (H / G) * P query rows a position, of which row r is step r % P. Queries are packed position by position: row
t * R + r.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from pyquiet.kernels import thought_attention

from .thought_attention_decomposition import decomposition
from .thought_attention_layouts import (
    additive,
    blocked_keys,
    diagonal_mask,
    from_rows,
    packed_keys,
    position_rows,
    step_major,
    step_mask,
)
from .thought_attention_problem import Inputs, Method, Shape, forward_of, training_of


def kernel(inputs: Inputs) -> Method:
    """The public function on the layout of its contract."""
    run = functools.partial(thought_attention, text_limits=inputs.text_limits, scale=inputs.scale)
    return Method(inputs.tensors, run, unpack=lambda out: out)


def dense(inputs: Inputs) -> Method:
    """One SDPA call with a [T*P, T+T*P] mask over text and all paths."""
    t, p = inputs.shape.positions, inputs.shape.steps
    q = inputs.query.flatten(2, 3)
    row, key = torch.arange(t * p, device=q.device)[:, None], torch.arange(t + t * p, device=q.device)[None]
    mask = additive(path_mask(t, p)(None, None, row, key), q)
    grouped = inputs.shape.heads != inputs.shape.kv_heads
    return Method(
        (q, *packed_keys(inputs)),
        functools.partial(functional.scaled_dot_product_attention, attn_mask=mask, enable_gqa=grouped),
        unpack=lambda out: out.view(inputs.query.shape),
    )


def stepwise(inputs: Inputs) -> Method:
    """P SDPA calls whose keys and mask grow by T each: the passes of the Quiet-STaR release.

    The release appends to its keys and its mask in every pass; here both are views of one buffer.
    """
    t, p = inputs.shape.positions, inputs.shape.steps
    q = inputs.query.transpose(2, 3).contiguous()  # [B, H, P, T, D]
    k = step_major(inputs.text_key, inputs.path_key)  # [B, G, (1 + P) T, D]
    v = step_major(inputs.text_value, inputs.path_value)
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    mask = additive(torch.cat([causal, torch.eye(t, dtype=torch.bool).repeat(1, p)], 1), q)
    grouped = inputs.shape.heads != inputs.shape.kv_heads

    def run(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        outs = []
        for step in range(p):
            n = (step + 2) * t
            keys, values, seen = k[:, :, :n], v[:, :, :n], mask[:, :n]
            outs.append(
                functional.scaled_dot_product_attention(q[:, :, step], keys, values, attn_mask=seen, enable_gqa=grouped)
            )
        return outs

    return Method((q, k, v), run, unpack=lambda outs: torch.stack(outs, 3))


def flex(inputs: Inputs, block_size: int, mode: str | None = None) -> Method:
    """Compiled FlexAttention on the packed rows; the block mask is made before the clock starts."""
    mask = path_block_mask(inputs.shape.positions, inputs.shape.steps, block_size, inputs.query.device)
    compiled = torch.compile(flex_attention, dynamic=False, mode=mode)
    grouped = inputs.shape.heads != inputs.shape.kv_heads
    return Method(
        (inputs.query.flatten(2, 3), *packed_keys(inputs)),
        functools.partial(compiled, block_mask=mask, enable_gqa=grouped),
        unpack=lambda out: out.view(inputs.query.shape),
    )


def eager(inputs: Inputs, block: int | None = None, compiled: bool = False) -> Method:
    """Softmax over the concatenation [prefix | own path], `block` positions at a time (None is all of them).

    No step is in place, so that autograd can go back through it; the prefix is trimmed block by block. `split` rather
    than slices, each of which would add a gradient of the whole.
    """
    s = inputs.shape
    n, t, p, r, d = s.batch * s.kv_heads, s.positions, s.steps, s.rows, s.head_size
    block = min(block or t, t)
    q, scale = position_rows(inputs), inputs.scale
    text_mask, own_mask = diagonal_mask(block, r, q), step_mask(r, p, q)

    def attend(q: Tensor, keys: Tensor, values: Tensor, path_key: Tensor, path_value: Tensor) -> Tensor:
        outs = []
        parts = zip(*(x.split(block, 1) for x in (q * scale, path_key, path_value)), keys.split(block, 2), strict=True)
        for i, (q_part, k_own, v_own, k_diagonal) in zip(range(0, t, block), parts, strict=True):
            q_text, q_own = q_part.reshape(n, block * r, d), q_part.reshape(n * block, r, d)
            scores = [
                torch.baddbmm(text_mask, q_text, k_diagonal),
                torch.baddbmm(own_mask, q_own, k_own.reshape(-1, p, d).mT).view(n, block * r, p),
            ]
            if i:
                scores.insert(0, torch.bmm(q_text, keys[:, :, :i]))
            text, own = torch.cat(scores, -1).softmax(-1).split([i + block, p], -1)
            part = torch.bmm(own.reshape(-1, r, p), v_own.reshape(-1, p, d)).view(n, block * r, d)
            outs.append(torch.baddbmm(part, text, values[:, : i + block]).view(n, block, r, d))
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0]

    run = torch.compile(attend, dynamic=False) if compiled else attend
    return Method((q, *blocked_keys(inputs)), run, unpack=lambda out: from_rows(out, s))


def blocked(inputs: Inputs) -> Method:
    """The eager form block by block; in place where that is possible and, as in float32 alone, faster."""
    if inputs.query.requires_grad or inputs.query.dtype is not torch.float32:
        return eager(inputs, positions_to_concatenate(inputs.shape.steps))
    return blocked_in_place(inputs)


def blocked_in_place(inputs: Inputs) -> Method:
    """The blocked form with every step in place and no concatenation of scores; it has no gradient."""
    s, block = inputs.shape, positions_a_block(inputs.shape.steps)
    n, t, p, r, d = s.batch * s.kv_heads, s.positions, s.steps, s.rows, s.head_size
    q, scale = position_rows(inputs), inputs.scale
    text_mask, own_mask = diagonal_mask(block, r, q), step_mask(r, p, q).expand(n * block, r, p)
    nothing, out = q.new_zeros(1, 1, 1), torch.empty_like(q)

    def run(q: Tensor, keys: Tensor, values: Tensor, path_key: Tensor, path_value: Tensor) -> Tensor:
        for i in range(0, t, block):
            j = i + block
            q_text, q_own = q[:, i:j].reshape(n, block * r, d), q[:, i:j].reshape(n * block, r, d)
            k_own, v_own = path_key[:, i:j].reshape(-1, p, d), path_value[:, i:j].reshape(-1, p, d)
            text = torch.baddbmm(nothing, q_text, keys[:, :, :j], beta=0, alpha=scale)
            text[:, :, i:] += text_mask
            own = torch.baddbmm(own_mask, q_own, k_own.mT, alpha=scale)
            own = own.view(n, block * r, p)
            top = torch.maximum(text.amax(-1, keepdim=True), own.amax(-1, keepdim=True))
            text.sub_(top).exp_()
            own.sub_(top).exp_()
            mass = text.sum(-1, keepdim=True).add_(own.sum(-1, keepdim=True))
            part = torch.bmm(text, values[:, :j])
            part += torch.bmm(own.view(-1, r, p), v_own).view(n, block * r, d)
            torch.div(part.view(n, block, r, d), mass.view(n, block, r, 1), out=out[:, i:j])
        return out

    return Method((q, *blocked_keys(inputs)), run, unpack=lambda result: from_rows(result, s))


def compiled_blocked(inputs: Inputs) -> Method:
    """torch.compile of the blocked form: without the concatenation of scores, or, faster backwards, with it."""
    if inputs.query.requires_grad:
        return eager(inputs, positions_to_concatenate(inputs.shape.steps), compiled=True)
    s, block = inputs.shape, positions_a_block(inputs.shape.steps)
    n, t, p, r, d = s.batch * s.kv_heads, s.positions, s.steps, s.rows, s.head_size
    q, scale = position_rows(inputs), inputs.scale
    masks = (diagonal_mask(block, r, q), step_mask(r, p, q))

    def attend(
        q: Tensor, keys: Tensor, values: Tensor, path_key: Tensor, path_value: Tensor,
        text_mask: Tensor, own_mask: Tensor,
    ) -> Tensor:  # fmt: skip
        outs = []
        parts = zip(*(x.split(block, 1) for x in (q, path_key, path_value)), strict=True)
        for i, (q_part, k_own, v_own) in zip(range(0, t, block), parts, strict=True):
            j = i + block
            q_own, k_own, v_own = q_part.reshape(-1, r, d), k_own.reshape(-1, p, d), v_own.reshape(-1, p, d)
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
    return Method(
        (q, *blocked_keys(inputs)),
        run=lambda *tensors: compiled(*tensors, *masks),
        unpack=lambda out: from_rows(out, s),
    )


def positions_a_block(steps: int) -> int:
    """Return the fastest number of positions in a block of 8, 16, 32, 64 and 128, as measured."""
    if steps == 1:
        return 128
    return 32 if steps < 16 else 16


def positions_to_concatenate(steps: int) -> int:
    """Return the same for the form that concatenates scores; measured forward and backward."""
    return 128 if steps == 1 else 64


def eager_results(inputs: Inputs, d_out: Tensor | None) -> Sequence[Tensor]:
    """Return the plain eager form's output and, with `d_out`, gradients: the yardstick of half precision."""
    run, unpack = forward_of(eager, inputs) if d_out is None else training_of(eager, inputs, d_out)
    return unpack(run())


def path_mask(t: int, p: int) -> Callable[..., Tensor]:
    """Return the mask of packed rows against [text | paths]: earlier text, own path up to now."""

    def visible(b: object, h: object, row: Tensor, key: Tensor) -> Tensor:
        own = key - t
        return torch.where(key < t, key <= row // p, (own // p == row // p) & (own <= row))

    return visible


def path_block_mask(t: int, p: int, block: int, device: torch.device) -> BlockMask:
    """Return FlexAttention's block mask without ever making the [T*P, T+T*P] grid.

    Text blocks below the diagonal are full; blocks on it, and own-path blocks, are partial.
    """
    if t % block or (t * p) % block:
        raise ValueError(f"block is {block}; it must divide T = {t}, or text and paths share a block")
    first = torch.arange(t * p // block, device=device)[:, None] * block  # first packed row of a query block
    last = first + block - 1
    text = torch.arange(t // block, device=device)[None] * block  # first key of a text block
    own = torch.arange(t * p // block, device=device)[None] * block
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


METHODS: dict[str, Callable[[Inputs], Method]] = {
    "pyquiet": kernel,
    "dense": dense,
    "stepwise": stepwise,
    "eager": eager,
    "blocked": blocked,
    "decomposition": decomposition,
    "flex-32": functools.partial(flex, block_size=32),
    "flex-16": functools.partial(flex, block_size=16),
    "compiled blocked": compiled_blocked,
}


def scores(method: str, shape: Shape) -> int:
    """Return how many scores a method forms at once; 0 for those that form few."""
    return {"dense": shape.dense_scores, "stepwise": shape.stepwise_scores, "eager": shape.eager_scores}.get(method, 0)
