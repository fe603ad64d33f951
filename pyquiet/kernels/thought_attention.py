"""Attention of thoughts: one softmax over a prefix of the text and over the thought's own path.

Letters: B batch, H query heads, G KV heads, T positions, S text keys, P path steps, Q query steps, D head size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyquiet.kernels.registration import is_plain, register_op
from pyquiet.native import cpu

_MAX_HEAD_SIZE = 256
_MAX_TEXT = 2**31 - 1 - 4096
_MAX_FACTOR = 1e30  # float32 holds it and its inverse


def thought_attention(
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    path_key: Tensor,
    path_value: Tensor,
    *,
    text_limits: Tensor,
    text_start: Tensor | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention output [B, H, T, Q, D] of every thought step (arXiv 2403.09629, section 4.2).

    Query step q of position i sees, in one softmax, the text keys `text_start[b] <= s < text_limits[b, i]` and the keys
    0 .. P-Q+q of its own path, never another position's path. It stands at position `text_limits[b, i] + P-Q+q`.

    Args:
        query: [B, H, T, Q, D]; D a multiple of 8 up to 256. Every tensor needs a contiguous last dimension, no more.
        text_key, text_value: [B, G, S, D], H a multiple of G.
        path_key, path_value: [B, G, T, P, D], P >= Q.
        text_limits: int64 [B, T], each in 0..S, in any order (so N thoughts fold into T).
        text_start: int64 [B], the left padding; None is 0.
        scale: factor of the scores.
        window: a key is seen only if the query's position minus the key's is less; None is no window.
        softcap: scores become softcap * tanh(score / softcap); None is none.
        return_lse: also return the log-sum-exp (natural logarithm) of the scores, [B, H, T, Q], not differentiable.

    Returns:
        The output in the query's dtype, or (output, lse). float32 on the CPU runs the native kernel, which keeps no
        tensor of T x S; float64, half precision, other devices and inputs that need a gradient take `reference`.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it. Nothing is computed then.
    """
    inputs = (query, text_key, text_value, path_key, path_value)
    arguments = (*inputs, text_limits, text_start, scale, window, softcap)
    if torch.is_grad_enabled() and _needs_grad(*inputs):
        out, lse = reference(*arguments)
        return (out, lse.detach()) if return_lse else out
    if is_plain(arguments[:7]):
        out, lse = _forward(arguments, return_lse)
    else:
        out, lse = torch.ops.pyquiet.thought_attention(*arguments)
    return (out, lse) if return_lse else out


def reference(
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    path_key: Tensor,
    path_value: Tensor,
    text_limits: Tensor,
    text_start: Tensor | None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The slow, obvious twin of `thought_attention`: (output, lse). Differentiable; forms all T x Q x S scores."""
    _check(
        query,
        text_key,
        text_value,
        path_key,
        path_value,
        text_limits,
        text_start,
        scale,
        window,
        softcap,
    )
    H, S, P = query.shape[1], text_key.shape[2], path_key.shape[3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = H // text_key.shape[1]
    q = query.to(dtype)
    tk, tv, pk, pv = (x.to(dtype).repeat_interleave(group, 1) for x in (text_key, text_value, path_key, path_value))

    scores = torch.cat([torch.einsum("bhtqd,bhsd->bhtqs", q, tk), torch.einsum("bhtqd,bhtpd->bhtqp", q, pk)], -1)
    scores = scores * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_seen(query, text_limits, text_start, S, P, window), -math.inf)
    weights = scores.softmax(-1)
    out = torch.einsum("bhtqs,bhsd->bhtqd", weights[..., :S], tv)
    out = out + torch.einsum("bhtqp,bhtpd->bhtqd", weights[..., S:], pv)
    return out.to(query.dtype), scores.logsumexp(-1)


def _needs_grad(q: Tensor, tk: Tensor, tv: Tensor, pk: Tensor, pv: Tensor) -> bool:
    return q.requires_grad or tk.requires_grad or tv.requires_grad or pk.requires_grad or pv.requires_grad


def _seen(query: Tensor, limits: Tensor, start: Tensor | None, S: int, P: int, window: int | None) -> Tensor:
    """bool [B, 1, T, Q, S + P]: which keys a query step sees."""
    Q, device = query.shape[3], query.device
    limit = limits[:, None, :, None, None]  # [B, 1, T, 1, 1]
    step = torch.arange(Q, device=device)[:, None] + (P - Q)  # [Q, 1] place on the path
    key = torch.arange(S, device=device)
    seen_text = key < limit
    if start is not None:
        seen_text = seen_text & (key >= start[:, None, None, None, None])
    own = torch.arange(P, device=device)
    seen_own = (own <= step).expand(*limit.shape[:3], Q, P)
    if window is not None:
        seen_text = seen_text & (limit + step - key < window)
        seen_own = seen_own & (step - own < window)
    return torch.cat([seen_text.expand(*limit.shape[:3], Q, S), seen_own], -1)


def _forward(arguments: tuple[Any, ...], want_lse: bool) -> tuple[Tensor, Tensor]:
    query: Tensor = arguments[0]
    if cpu is None or query.dtype is not torch.float32 or not query.is_cpu or not query.numel():
        return reference(*arguments)
    scale, window, softcap = arguments[7:]
    out = _empty_output(query)
    lse = query.new_empty(query.shape[:-1]) if want_lse else None
    if (window is not None and window < 1) or (softcap is not None and not softcap > 0):
        _check(*arguments)
    native_call: Callable[..., bool] = cpu.thought_attention
    if not native_call(
        *arguments[:7], out, lse, scale, min(window or 0, _MAX_TEXT), softcap or 0.0, torch.get_num_threads()
    ):
        _check(*arguments)
        raise AssertionError("the native kernel refused arguments that fit the contract")
    return out, lse  # type: ignore[return-value]  # lse is None only where nobody asked for it


def _empty_output(query: Tensor) -> Tensor:
    """An output laid out as the query, so that a model's transposed view comes back as one; its rows contiguous."""
    out = torch.empty_like(query)
    return out if out.stride(-1) == 1 else query.new_empty(query.shape)


def _fake(
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    path_key: Tensor,
    path_value: Tensor,
    text_limits: Tensor,
    text_start: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    return _empty_output(query), query.new_empty(
        query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32)
    )


@register_op(fake=_fake)
def _thought_attention(
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    path_key: Tensor,
    path_value: Tensor,
    text_limits: Tensor,
    text_start: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    inputs = (query, text_key, text_value, path_key, path_value)
    out, lse = _forward((*inputs, text_limits, text_start, scale, window, softcap), want_lse=True)
    return _empty_output(query).copy_(out), lse  # strides as `_fake` says, whichever path was taken


def _check(
    query: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    path_key: Tensor,
    path_value: Tensor,
    text_limits: Tensor,
    text_start: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    B, H, T, Q, D, G, S, P = _sizes(query, text_key, path_key)
    for name, tensor, shape in (
        ("query", query, (B, H, T, Q, D)),
        ("text_key", text_key, (B, G, S, D)),
        ("text_value", text_value, (B, G, S, D)),
        ("path_key", path_key, (B, G, T, P, D)),
        ("path_value", path_value, (B, G, T, P, D)),
    ):
        _check_tensor(name, tensor, shape, query.dtype, query.device)
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; call .contiguous() on it")
    _check_range("text_limits", text_limits, (B, T), query.device, S)
    if text_start is not None:
        _check_range("text_start", text_start, (B,), query.device, S)
    if not abs(scale) <= _MAX_FACTOR:
        raise ValueError(f"scale must be finite and at most {_MAX_FACTOR:g} in size, got {scale}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None for no window, got {window}")
    if softcap is not None and not 1 / _MAX_FACTOR <= softcap <= _MAX_FACTOR:
        raise ValueError(f"softcap must be positive (1e-30 to 1e30), or None for no cap, got {softcap}")


def _sizes(query: Tensor, text_key: Tensor, path_key: Tensor) -> tuple[int, ...]:
    if query.ndim != 5 or text_key.ndim != 4 or path_key.ndim != 5:
        raise ValueError(
            "query must be [B, H, T, Q, D], text_key [B, G, S, D] and path_key [B, G, T, P, D]; got "
            f"{list(query.shape)}, {list(text_key.shape)} and {list(path_key.shape)}"
        )
    B, H, T, Q, D = query.shape
    G, S, P = text_key.shape[1], text_key.shape[2], path_key.shape[3]
    if not query.is_floating_point():
        raise TypeError(f"query must be a floating-point tensor, got {query.dtype}")
    if D % 8 or not 8 <= D <= _MAX_HEAD_SIZE:
        raise ValueError(f"query has head size D={D}; it must be a multiple of 8 from 8 to 256: pad it with zeros")
    if G < 1 or H % G:
        raise ValueError(f"query has H={H} heads, which is not a multiple of the G={G} heads of text_key")
    if not 1 <= Q <= P:
        raise ValueError(f"query has Q={Q} steps but path_key P={P}; 1 <= Q <= P must hold")
    if S > _MAX_TEXT:
        raise ValueError(f"text_key has S={S} keys, more than {_MAX_TEXT}")
    return B, H, T, Q, D, G, S, P


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}; convert it with .to({dtype})")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but query on {device}; move it there")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _check_range(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, S: int) -> None:
    _check_tensor(name, tensor, shape, torch.int64, device)
    if torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor) or not tensor.numel():
        return
    low, high = (int(x) for x in tensor.aminmax())
    if low < 0 or high > S:
        raise ValueError(f"{name} must lie in 0..S={S}, the number of text keys; got values from {low} to {high}")
