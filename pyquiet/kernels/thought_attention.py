"""Attention of thoughts: one softmax over a prefix of the text and over the thought's own path.

Letters: B batch, H query heads, G KV heads, T positions, S text keys, P path steps, Q query steps, D head size.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyquiet.kernels.registration import Kernel, Tensors, check_tensor, cuda_stream, empty_rows_like
from pyquiet.native import cpu, cuda

_MAX_HEAD_SIZE = 256
_MAX_TEXT = 2**31 - 1 - 4096
_MAX_PATH, _MAX_ROWS = 2**23 - 1, 2**30 - 1  # steps of a path, heads times query steps
_MAX_FACTOR = 1e30  # float32 holds it and its inverse


class Arguments(NamedTuple):
    """The arguments of `thought_attention`, which explains them, in the order of the op and of the native calls."""

    query: Tensor
    text_key: Tensor
    text_value: Tensor
    path_key: Tensor
    path_value: Tensor
    text_limits: Tensor
    text_start: Tensor | None
    scale: float
    window: int | None
    softcap: float | None

    @property
    def inputs(self) -> Tensors:
        """The differentiable arguments."""
        return self.query, self.text_key, self.text_value, self.path_key, self.path_value


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
        The output in the query's dtype, or (output, lse); lse is float32 (float64 for float64). float32 and bfloat16 on
        the CPU, and these and float16 on CUDA, run native kernels, forward and backward, which keep no tensor of T x S;
        float64 takes `reference` and `reference_backward`. Arithmetic is in float32. Not differentiable twice.

    Raises:
        TypeError, ValueError: an argument breaks the contract; the message names it. Nothing is computed then. On
            CUDA the values of text_limits and text_start are not read back: a row whose are out of range comes out NaN.
    """
    out, lse = _kernel(
        (query, text_key, text_value, path_key, path_value, text_limits, text_start, scale, window, softcap), return_lse
    )
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
    a = Arguments(query, text_key, text_value, path_key, path_value, text_limits, text_start, scale, window, softcap)
    _check(a)
    S = text_key.shape[2]
    with torch.autocast(query.device.type, enabled=False):
        _, _, tv, _, pv = _upcast(a)
        scores = _scores(a)
        weights = scores.softmax(-1)
        out = torch.einsum("bhtqs,bhsd->bhtqd", weights[..., :S], tv)
        out = out + torch.einsum("bhtqp,bhtpd->bhtqd", weights[..., S:], pv)
        return out.to(query.dtype), scores.logsumexp(-1)


def reference_backward(d_out: Tensor, outputs: Tensors, arguments: Arguments) -> Tensors:
    """The slow, obvious twin of the backward kernels: gradients of query, text key and value, path key and value.

    Weights are recomputed from the saved log-sum-exp of text and own path together, p = exp(score - lse), so neither
    part needs the other's scores: ds = p (d_out . v - delta) with delta = out . d_out.
    """
    a = Arguments(*arguments)
    out, lse = outputs
    (G, S), H = a.text_key.shape[1:3], a.query.shape[1]
    with torch.autocast(a.query.device.type, enabled=False):
        q, tk, tv, pk, pv = _upcast(a)
        d, scores = d_out.to(q.dtype), _scores(a)
        p = torch.exp(scores - lse[..., None])
        delta = (out.to(q.dtype) * d).sum(-1, keepdim=True)
        d_weights = torch.cat([torch.einsum("bhtqd,bhsd->bhtqs", d, tv), torch.einsum("bhtqd,bhtpd->bhtqp", d, pv)], -1)
        ds = p * (d_weights - delta) * a.scale
        if a.softcap is not None:
            ds = ds * (1 - (scores.masked_fill(p == 0, 0) / a.softcap) ** 2)
        text, own, p_text, p_own = ds[..., :S], ds[..., S:], p[..., :S], p[..., S:]
        gradients = (
            torch.einsum("bhtqs,bhsd->bhtqd", text, tk) + torch.einsum("bhtqp,bhtpd->bhtqd", own, pk),
            *(torch.einsum("bhtqs,bhtqd->bhsd", w, x) for w, x in ((text, q), (p_text, d))),
            *(torch.einsum("bhtqp,bhtqd->bhtpd", w, x) for w, x in ((own, q), (p_own, d))),
        )
        # The heads of a group share their keys and values.
        summed = (gradients[0], *(x.unflatten(1, (G, H // G)).sum(2) for x in gradients[1:]))
        return tuple(empty_rows_like(x).copy_(dx) for x, dx in zip(a.inputs, summed, strict=True))


def _upcast(a: Arguments) -> Tensors:
    """The five inputs in float32 at least, keys and values repeated for the heads of their group."""
    dtype = torch.promote_types(a.query.dtype, torch.float32)
    group = a.query.shape[1] // a.text_key.shape[1]
    return (a.query.to(dtype), *(x.to(dtype).repeat_interleave(group, 1) for x in a.inputs[1:]))


def _scores(a: Arguments) -> Tensor:
    """[B, H, T, Q, S + P], -inf where a key is not seen."""
    q, tk, _, pk, _ = _upcast(a)
    scores = torch.cat([torch.einsum("bhtqd,bhsd->bhtqs", q, tk), torch.einsum("bhtqd,bhtpd->bhtqp", q, pk)], -1)
    scores = scores * a.scale
    if a.softcap is not None:
        scores = a.softcap * torch.tanh(scores / a.softcap)
    return scores.masked_fill(~_seen(a), -math.inf)


def _seen(a: Arguments) -> Tensor:
    """bool [B, 1, T, Q, S + P]: which keys a query step sees."""
    Q, S, P, device = a.query.shape[3], a.text_key.shape[2], a.path_key.shape[3], a.query.device
    limit = a.text_limits[:, None, :, None, None]  # [B, 1, T, 1, 1]
    step = torch.arange(Q, device=device)[:, None] + (P - Q)  # [Q, 1] place on the path
    key = torch.arange(S, device=device)
    seen_text = key < limit
    if a.text_start is not None:
        seen_text = seen_text & (key >= a.text_start[:, None, None, None, None])
    own = torch.arange(P, device=device)
    seen_own = (own <= step).expand(*limit.shape[:3], Q, P)
    if a.window is not None:
        seen_text = seen_text & (limit + step - key < a.window)
        seen_own = seen_own & (step - own < a.window)
    return torch.cat([seen_text.expand(*limit.shape[:3], Q, S), seen_own], -1)


def _forward(arguments: tuple[Any, ...], all_outputs: bool) -> Tensors:
    query: Tensor = arguments[0]
    if not _runs_natively(query):
        out, lse = _fake(arguments)
        if query.is_meta:
            return out, lse
        expected, exact_lse = reference(*arguments)
        return out.copy_(expected), lse.copy_(exact_lse)
    outputs = _fake(arguments) if all_outputs else (empty_rows_like(query), None)
    if query.is_cpu:
        on_cpu: Callable[..., bool] = cpu.thought_attention
        accepted = on_cpu(*arguments, *outputs, torch.get_num_threads())
    else:
        with torch.cuda.device(query.device):
            accepted = cuda().thought_attention(*arguments, *outputs, cuda_stream())
    if not accepted:
        _kernel.refuse(arguments)
    return outputs  # type: ignore[return-value]  # the lse is None only where nobody asked for it


def _fake(arguments: tuple[Any, ...]) -> Tensors:
    query: Tensor = arguments[0]
    lse_dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    return empty_rows_like(query), query.new_empty(query.shape[:-1], dtype=lse_dtype)


def _backward(d_out: Tensor, outputs: Tensors, arguments: tuple[Any, ...]) -> Tensors:
    a = Arguments(*arguments)
    if not _runs_natively(a.query):
        return reference_backward(d_out, outputs, a)
    out, lse = outputs
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    gradients = tuple(empty_rows_like(x) for x in a.inputs)
    if a.query.is_cpu:
        on_cpu: Callable[..., bool] = cpu.thought_attention_backward
        accepted = on_cpu(*arguments, out, d_out, lse, *gradients, torch.get_num_threads())
    else:
        module = cuda()
        sizes = (*a.query.shape[:4], *a.text_key.shape[1:3], a.path_key.shape[3])
        workspace = lse.new_empty(module.thought_attention_backward_workspace(*sizes))
        with torch.cuda.device(a.query.device):
            accepted = module.thought_attention_backward(
                *arguments, out, d_out, lse, *gradients, workspace, cuda_stream()
            )
    if not accepted:
        _kernel.refuse(arguments)
    return gradients


_kernel = Kernel(
    "thought_attention",
    Arguments,
    outputs=2,
    forward=_forward,
    fake=_fake,
    check=lambda arguments: _check(Arguments(*arguments)),
    inputs=5,
    backward=_backward,
)

_CPU_DTYPES = {torch.float32, torch.bfloat16}
_CUDA_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
_DTYPES = _CUDA_DTYPES | {torch.float64}


def _runs_natively(query: Tensor) -> bool:
    if query.is_cpu:
        return cpu is not None and query.dtype in _CPU_DTYPES and query.numel() > 0
    return query.is_cuda and query.dtype in _CUDA_DTYPES and query.numel() > 0 and cuda() is not None


def _check(a: Arguments) -> None:
    _check_types(a)
    query = a.query
    B, H, T, Q, D, G, S, P = _sizes(query, a.text_key, a.path_key)
    for name, tensor, shape in (
        ("query", query, (B, H, T, Q, D)),
        ("text_key", a.text_key, (B, G, S, D)),
        ("text_value", a.text_value, (B, G, S, D)),
        ("path_key", a.path_key, (B, G, T, P, D)),
        ("path_value", a.path_value, (B, G, T, P, D)),
    ):
        check_tensor(name, tensor, shape, query.dtype, "query", query.device)
        if tensor.numel() and tensor.stride(-1) != 1:
            raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; call .contiguous() on it")
    _check_range("text_limits", a.text_limits, (B, T), query.device, S)
    if a.text_start is not None:
        _check_range("text_start", a.text_start, (B,), query.device, S)
    if not abs(a.scale) <= _MAX_FACTOR:
        raise ValueError(f"scale must be finite and at most {_MAX_FACTOR:g} in size, got {a.scale}")
    if a.window is not None and a.window < 1:
        raise ValueError(f"window must be at least 1, or None for no window, got {a.window}")
    if a.softcap is not None and not 1 / _MAX_FACTOR <= a.softcap <= _MAX_FACTOR:
        raise ValueError(f"softcap must be positive (1e-30 to 1e30), or None for no cap, got {a.softcap}")
    if a.softcap is not None and not abs(a.scale) / a.softcap <= _MAX_FACTOR:
        raise ValueError(f"scale / softcap must be at most {_MAX_FACTOR:g} in size, got {a.scale} / {a.softcap}")


def _check_types(a: Arguments) -> None:
    for name, value in zip(a._fields, a, strict=True):
        kind: Any = Tensor
        if name in ("scale", "window", "softcap"):
            kind = int if name == "window" else int | float
        if not isinstance(value, kind) and not (value is None and name in ("text_start", "window", "softcap")):
            wanted = "a tensor" if kind is Tensor else "an int" if kind is int else "a number"
            raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            raise TypeError(f"{name} has layout {value.layout}; give it dense, with .to_dense()")


def _sizes(query: Tensor, text_key: Tensor, path_key: Tensor) -> tuple[int, ...]:
    if query.ndim != 5 or text_key.ndim != 4 or path_key.ndim != 5:
        raise ValueError(
            "query must be [B, H, T, Q, D], text_key [B, G, S, D] and path_key [B, G, T, P, D]; got "
            f"{list(query.shape)}, {list(text_key.shape)} and {list(path_key.shape)}"
        )
    B, H, T, Q, D = query.shape
    G, S, P = text_key.shape[1], text_key.shape[2], path_key.shape[3]
    if query.dtype not in _DTYPES:
        raise TypeError(f"query must be float32, bfloat16, float16 or float64, got {query.dtype}")
    if D % 8 or not 8 <= D <= _MAX_HEAD_SIZE:
        raise ValueError(f"query has head size D={D}; it must be a multiple of 8 from 8 to 256: pad it with zeros")
    if G < 1 or H % G:
        raise ValueError(f"query has H={H} heads, which is not a multiple of the G={G} heads of text_key")
    if not 1 <= Q <= P:
        raise ValueError(f"query has Q={Q} steps but path_key P={P}; 1 <= Q <= P must hold")
    if P > _MAX_PATH or H * Q > _MAX_ROWS:
        raise ValueError(
            f"path_key has P={P} steps (at most {_MAX_PATH}), query H * Q={H * Q} rows a position (at most {_MAX_ROWS})"
        )
    if S > _MAX_TEXT:
        raise ValueError(f"text_key has S={S} keys, more than {_MAX_TEXT}")
    return B, H, T, Q, D, G, S, P


def _check_range(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device, S: int) -> None:
    check_tensor(name, tensor, shape, torch.int64, "query", device)
    if (
        torch.compiler.is_compiling()
        or isinstance(tensor, torch._subclasses.FakeTensor)
        or tensor.is_meta
        or not tensor.numel()
    ):
        return
    low, high = (int(x) for x in tensor.aminmax())
    if low < 0 or high > S:
        raise ValueError(f"{name} must lie in 0..S={S}, the number of text keys; got values from {low} to {high}")
