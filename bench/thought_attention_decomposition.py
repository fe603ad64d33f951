"""Thought attention by torch's own flash attention: text and own paths apart, merged by log-sum-exp.

Torch returns the log-sum-exp from an internal operator alone, and its derivative not at all. So the backward is
written out here: flash attention's own backward operator is given the merged output and the merged log-sum-exp, with
which its probabilities are those of the one softmax. Letters as in `thought_attention_baselines`.
"""

from typing import Any

import torch
from torch import Tensor

from .thought_attention_layouts import from_rows, position_rows, step_mask
from .thought_attention_problem import Inputs, Method


def decomposition(inputs: Inputs) -> Method:
    """Causal flash over the text, batched products over the own paths, merged.

    The R rows of a position enter the flash kernel as R heads that share one text by stride 0.
    """
    s = inputs.shape
    n, t, p, r, d = s.batch * s.kv_heads, s.positions, s.steps, s.rows, s.head_size
    rows = position_rows(inputs)
    mask = step_mask(r, p, rows).expand(n * t, r, p)
    tensors = (
        rows,  # [N, T, R, D]
        inputs.text_key.reshape(n, 1, t, d),
        inputs.text_value.reshape(n, 1, t, d),
        inputs.path_key.reshape(n * t, p, d),
        inputs.path_value.reshape(n * t, p, d),
    )
    return Method(tensors, lambda *x: _Merged.apply(*x, mask, inputs.scale), unpack=lambda out: from_rows(out, s))


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, k: Tensor, v: Tensor, path_k: Tensor, path_v: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        n, t, r, d = rows.shape
        text, text_lse, rest = flash(rows.transpose(1, 2), k.expand(n, r, t, d), v.expand(n, r, t, d), scale)
        scores = torch.baddbmm(mask, rows.view(n * t, r, d), path_k.mT, alpha=scale).float()
        own_lse = scores.logsumexp(-1, keepdim=True)
        own = torch.bmm(scores.sub_(own_lse).exp_().to(rows.dtype), path_v).view(n, t, r, d)
        own_lse, text_lse = own_lse.view(n, t, r), text_lse.transpose(1, 2)
        weight = torch.sigmoid(own_lse - text_lse).to(rows.dtype)
        out = torch.lerp(text.transpose(1, 2), own, weight.unsqueeze(-1))
        if any(ctx.needs_input_grad):
            lse = torch.logaddexp(own_lse, text_lse)
            ctx.save_for_backward(rows, k, v, path_k, path_v, mask, out, lse)
            ctx.scale, ctx.rest = scale, rest
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, k, v, path_k, path_v, mask, out, lse = ctx.saved_tensors
        n, t, r, d = rows.shape
        d_rows, d_k, d_v = flash_backward(
            *(x.transpose(1, 2) for x in (d_out, rows)),
            k.expand(n, r, t, d),
            v.expand(n, r, t, d),
            *(x.transpose(1, 2) for x in (out, lse)),
            ctx.scale,
            ctx.rest,
        )
        q, d_own = rows.view(n * t, r, d), d_out.view(n * t, r, d)
        weights = torch.baddbmm(mask, q, path_k.mT, alpha=ctx.scale).float().sub_(lse.view(n * t, r, 1)).exp_()
        delta = (d_own * out.view(n * t, r, d)).sum(-1, keepdim=True, dtype=torch.float32)
        d_scores = torch.bmm(d_own, path_v.mT).float().sub_(delta).mul_(weights).mul_(ctx.scale).to(rows.dtype)
        d_path_v = torch.bmm(weights.to(rows.dtype).mT, d_own)
        d_rows = torch.baddbmm(d_rows.transpose(1, 2).reshape(n * t, r, d), d_scores, path_k)
        d_path_k = torch.bmm(d_scores.mT, q)
        return d_rows.view(n, t, r, d), d_k.sum(1, True), d_v.sum(1, True), d_path_k, d_path_v, None, None


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Return causal attention, its log-sum-exp [N, R, T], and what the backward operator needs besides."""
    if q.is_cpu:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        return out, lse, ()
    results = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return results[0], results[1], tuple(results[2:8])


def flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, rest: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v for this output and this log-sum-exp."""
    if q.is_cpu:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, True, scale=scale
        )
    lengths, random = rest[:4], rest[4:]
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        d_out, q, k, v, out, lse.contiguous(), *lengths, 0.0, True, *random, scale=scale
    )
