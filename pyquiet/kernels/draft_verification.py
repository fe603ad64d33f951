"""Verification of drafts against the target's joint density: accept tests, first rejection, its replacement, bonus.

Letters: B sequences, k drafts, V vocabulary; p the draft law, q the target law, u a uniform.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyquiet.checks import check_word
from pyquiet.kernels.registration import Kernel, Tensors, check_tensor, left_to_check, reads_natively
from pyquiet.randomness import (
    COUPLINGS,
    MAX_VOCABULARY,
    Purpose,
    Stream,
    check_processing,
    check_row,
    counter_fields,
    gumbel_noise,
    invert_cdf,
    process_logits,
    uniforms,
)

_NO_RESIDUAL = 1e-7  # a mass of max(q - p, 0) that is rounding; csrc/common/law.hpp has the same


@dataclass(frozen=True)
class Verification:
    """What `verify_draft` returns, on the logits' device.

    tokens: int64 [B, k+1], the accepted drafts, then the replacement or the bonus, then -1.
    count: int64 [B], how many tokens that is.
    accepted: int64 [B], how many drafts were kept.
    log_probs: float32 [B, k+1] (float64 for float64 logits), of the tokens under the processed target; 0 at padding and
        at temperature 0.
    bonus: bool [B], whether the last token is a bonus.
    """

    tokens: Tensor
    count: Tensor
    accepted: Tensor
    log_probs: Tensor
    bonus: Tensor


class Arguments(NamedTuple):
    """The arguments of `verify_draft` in the order of the op and of the native calls, the stream unpacked.

    stream_words: the fields of the stream that are ints, where its tensor is None; -1: the row's number.
    """

    target_logits: Tensor
    draft_logits: Tensor | None
    draft_tokens: Tensor
    draft_lse: Tensor | None
    banned: Tensor | None
    lengths: Tensor | None
    stream_sequence: Tensor | None
    stream_position: Tensor | None
    stream_step: Tensor | None
    stream_index: Tensor | None
    stream_words: Sequence[int]
    seed: int
    temperature: float
    draft_temperature: float
    top_k: int | None
    top_p: float | None
    first_is_exact: bool
    gumbel: bool
    deterministic: bool

    def stream(self, b: int, offset: int, purpose: Purpose) -> Stream:
        """The stream of one sequence, `offset` positions on."""
        tensors = (self.stream_sequence, self.stream_position, self.stream_step, self.stream_index)
        words = zip(tensors, self.stream_words, strict=True)
        sequence, position, step, index = (
            int(x[b]) if x is not None else b if word == -1 else word for x, word in words
        )
        return Stream(self.seed, purpose, sequence, position + offset, step, index)


def verify_draft(
    target_logits: Tensor,
    draft_logits: Tensor | None,
    draft_tokens: Tensor,
    *,
    stream: Stream,
    draft_lse: Tensor | None = None,
    temperature: float = 1.0,
    draft_temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    banned: Tensor | None = None,
    lengths: Tensor | None = None,
    first_is_exact: bool = False,
    coupling: str = "rejection",
    deterministic: bool = False,
) -> Verification:
    """Keeps drafts so that what is kept, with one more token, follows the target law (arXiv 2504.20456).

    q_j and p_j are the laws of `process_logits` of the target's and the draft's row j, under `temperature` and
    `draft_temperature`. In order, draft d_j is accepted if u p_j(d_j) < q_j(d_j). At the first that is not, a
    replacement is drawn from max(q_j - p_j, 0), by inverse CDF in vocabulary order, and the sequence ends: its later
    rows are not looked at. Where all drafts are accepted and the target has one more row, a bonus is drawn from it.

    Args:
        target_logits: [B, k+1, V], or [B, k, V] for no bonus. Last dimension contiguous; the other strides are free.
        draft_logits: [B, k, V] in the same dtype, the rows that the drafts were drawn from; read where `draft_lse` does
            not do, and at the rejected row. None where they are not needed: with gumbel, at temperature 0.
        draft_tokens: int64 [B, k].
        stream: row j counts at position + j; the purposes are ACCEPT, RESIDUAL and BONUS (or GUMBEL), whatever its own.
        draft_lse: [B, k], the log-sum-exps of the processed draft rows (`Drawn.lse`), to spare a reading; the drafts
            then count as kept by top_k and top_p.
        temperature, top_k, top_p, banned: as in `process_logits`; the last three hold for the draft as well. At
            temperature 0, d_j is accepted if it is the target's largest, and else replaced by it.
        draft_temperature: None is `temperature`.
        lengths: int64 [B], how many drafts a sequence has, in 0..k; its bonus is drawn from row lengths[b].
        first_is_exact: draft 0 was drawn from target row 0 under the target's processing, so it is accepted.
        coupling: "gumbel" takes for row j the target's largest score + Gumbel noise; a draft is accepted if it is that,
            as it often is where it was drawn by `draw(..., coupling="gumbel")` with the same stream.
        deterministic: integer weights, so that CPU and CUDA return the same tokens bit for bit for the same logits.

    float32 and bfloat16 on the CPU run the native kernel, which gives the same bits for any number of threads; other
    dtypes take `reference`, in float64. Not differentiable.

    >>> logits = torch.zeros(1, 3, 5)
    >>> verify_draft(logits, logits[:, :2], torch.tensor([[4, 1]]), stream=Stream(0)).tokens  # q = p: all accepted
    tensor([[4, 1, 2]])

    Raises:
        TypeError, ValueError: an argument breaks the contract, or a row that was looked at holds NaN or +inf at an id
            that is not banned, or has no id left; the message names it.
    """
    check_word("coupling", coupling, COUPLINGS)
    if not isinstance(target_logits, Tensor):
        raise TypeError(f"target_logits must be a tensor, got {type(target_logits).__name__}")
    tensors, words = counter_fields(stream, len(target_logits), target_logits.device)
    arguments = Arguments(
        target_logits,
        draft_logits,
        draft_tokens,
        _contiguous(draft_lse),
        _contiguous(banned),
        _contiguous(lengths),
        *tensors,
        stream_words=words,
        seed=stream.seed if stream.seed < 2**63 else stream.seed - 2**64,
        temperature=temperature,
        draft_temperature=temperature if draft_temperature is None else draft_temperature,
        top_k=top_k,
        top_p=top_p,
        first_is_exact=first_is_exact,
        gumbel=coupling == "gumbel",
        deterministic=deterministic,
    )
    *results, fault = _kernel(arguments)
    if left_to_check(fault):
        _raise_fault(arguments, fault)
    return Verification(*results)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return x.contiguous() if isinstance(x, Tensor) else x  # what is no tensor is refused by its name


def reference(*arguments: Any) -> Tensors:
    """The slow, obvious twin of the kernel: its arguments -> tokens, count, accepted, log_probs, bonus, fault (zeros).

    Laws, tests and cumulative sums are in float64, so `deterministic` changes nothing here.
    """
    a = Arguments(*arguments)
    _check(a)
    tokens, count, accepted, log_probs, bonus, fault = (x.zero_() for x in _fake(arguments))
    tokens.fill_(-1)
    k = a.draft_tokens.shape[1]
    for b in range(len(tokens)):
        length = k if a.lengths is None else int(a.lengths[b])
        for j in range(min(length + 1, a.target_logits.shape[1])):
            if j == length and a.target_logits.shape[1] == k:
                break
            log_q = _log_law(a, b, j)
            draft = int(a.draft_tokens[b, j]) if j < length else None
            token, kept = _choose(a, b, j, log_q, draft)
            tokens[b, j], log_probs[b, j] = token, log_q[token] if a.temperature != 0 else 0.0
            count[b] += 1
            accepted[b] += kept
            bonus[b] = j == length
            if not kept:
                break
    return tokens, count, accepted, log_probs, bonus, fault


def _choose(a: Arguments, b: int, j: int, log_q: Tensor, draft: int | None) -> tuple[int, bool]:
    """The token of row j, and whether it is the draft, kept."""
    if draft is not None and j == 0 and a.first_is_exact:
        return draft, True
    if a.gumbel or a.temperature == 0:
        score = log_q
        if a.temperature != 0:
            score = log_q + gumbel_noise(a.stream(b, j, Purpose.GUMBEL), 1, len(log_q), log_q.device)[0]
        choice = int(score.argmax())
        return choice, choice == draft
    if draft is None:
        return _invert(log_q.exp(), a.stream(b, j, Purpose.BONUS)), False
    log_u = uniforms(a.stream(b, j, Purpose.ACCEPT), 1).log().item()
    given = a.draft_lse is not None
    log_p = _log_draft_by_lse(a, b, j, draft) if given else _log_law(a, b, j, of_draft=True)[draft].item()
    if log_q[draft].item() > -math.inf and log_u < log_q[draft].item() - log_p:
        return draft, True
    residual = (log_q.exp() - _log_law(a, b, j, of_draft=True).exp()).clamp_min(0)
    if residual.sum() <= _NO_RESIDUAL:
        residual = log_q.exp()
    return _invert(residual, a.stream(b, j, Purpose.RESIDUAL)), False


def _log_law(a: Arguments, b: int, j: int, of_draft: bool = False) -> Tensor:
    """Log-probabilities [V], float64, of a row of the target or of the draft."""
    logits = a.draft_logits if of_draft else a.target_logits
    assert logits is not None
    temperature = a.draft_temperature if of_draft else a.temperature
    row = logits[b, j].unsqueeze(0)
    check_row(row, f"{'draft' if of_draft else 'target'}_logits[{b}, {j}]", temperature, a.banned)
    law = process_logits(row, temperature=temperature, top_k=a.top_k, top_p=a.top_p, banned=a.banned)
    return law[0].double().log_softmax(-1)


def _log_draft_by_lse(a: Arguments, b: int, j: int, draft: int) -> float:
    assert a.draft_logits is not None
    assert a.draft_lse is not None
    if a.draft_temperature == 0:
        return 0.0
    score = process_logits(a.draft_logits[b, j, draft].reshape(1, 1), temperature=a.draft_temperature).item()
    log_p = -math.inf if a.banned is not None and a.banned[draft] else score - a.draft_lse[b, j].item()
    if math.isnan(log_p):
        raise ValueError(f"draft_lse or draft_logits of sequence {b} holds NaN, in row {j}")
    return log_p


def _invert(weights: Tensor, stream: Stream) -> int:
    u = uniforms(stream, 1, weights.device)
    return int(invert_cdf(weights.cumsum(-1).unsqueeze(0), weights.unsqueeze(0), u))


def _forward(arguments: tuple[Any, ...], all_outputs: bool) -> Tensors:
    logits: Tensor = arguments[0]
    if logits.is_meta:
        return _fake(arguments)
    if not reads_natively(logits):
        return reference(*arguments)
    return _kernel.read_rows(arguments, _fake(arguments), (*arguments[2].shape, *logits.shape[1:]), _raise_fault)


def _fake(arguments: tuple[Any, ...]) -> Tensors:
    a = Arguments(*arguments)
    B, k = a.draft_tokens.shape
    new = a.target_logits.new_empty
    tokens, count = new((B, k + 1), dtype=torch.int64), new(B, dtype=torch.int64)
    accepted, fault = torch.empty_like(count), torch.empty_like(count)
    dtype = torch.float64 if a.target_logits.dtype is torch.float64 else torch.float32
    return tokens, count, accepted, new((B, k + 1), dtype=dtype), new(B, dtype=torch.bool), fault


_kernel = Kernel(
    "verify_draft",
    Arguments,
    outputs=6,
    forward=_forward,
    fake=_fake,
    check=lambda arguments: _check(Arguments(*arguments)),
)


def _raise_fault(arguments: tuple[Any, ...], fault: Tensor) -> None:
    """Raises what is wrong with the first row that a kernel marked (contract.hpp says how)."""
    if fault.any():
        a = Arguments(*arguments)
        b = int(fault.nonzero()[0])
        if fault[b] < 0:  # an index out of range, which on CUDA the kernel is the first to see
            _check(a)
        _log_law(a, b, (int(fault[b]) - 1) // 2, of_draft=int(fault[b]) % 2 == 0)
        raise ValueError(f"draft_lse or draft_logits of sequence {b} holds NaN, in row {(int(fault[b]) - 1) // 2}")


def _check(a: Arguments) -> None:
    target = a.target_logits
    for name, value in zip(a._fields[:6], a[:6], strict=True):
        if not isinstance(value, Tensor) and (value is not None or name == "draft_tokens"):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not target.is_floating_point():
        raise TypeError(f"target_logits must be floating point, got {target.dtype}")
    if a.draft_tokens.ndim != 2 or target.ndim != 3 or not 1 <= target.shape[2] <= MAX_VOCABULARY:
        raise ValueError(
            f"target_logits must be [B, k+1, V] or [B, k, V] with 1 <= V <= 2^24, and draft_tokens [B, k]; got "
            f"{list(target.shape)} and {list(a.draft_tokens.shape)}"
        )
    (B, k), V = a.draft_tokens.shape, target.shape[2]
    if target.shape[0] != B or target.shape[1] not in (k, k + 1):
        raise ValueError(f"target_logits must be [{B}, {k + 1} or {k}, V] for {k} drafts, got {list(target.shape)}")
    dtype = torch.float64 if target.dtype is torch.float64 else torch.float32
    for name, shape, kind in (
        ("draft_tokens", (B, k), torch.int64),
        ("draft_logits", (B, k, V), target.dtype),
        ("draft_lse", (B, k), dtype),
        ("lengths", (B,), torch.int64),
    ):
        if getattr(a, name) is not None:
            check_tensor(name, getattr(a, name), shape, kind, "target_logits", target.device)
    check_processing(V, a.temperature, a.top_k, a.top_p, a.banned)
    check_processing(V, a.draft_temperature, name="draft_temperature")
    if a.draft_logits is None and not (a.gumbel or a.temperature == 0 or k <= a.first_is_exact):
        raise ValueError("draft_logits is None, but coupling 'rejection' at a temperature above 0 needs the draft rows")
    for name, logits in (("target_logits", target), ("draft_logits", a.draft_logits)):
        if logits is not None and logits.numel() and logits.stride(-1) != 1 and V > 1:
            raise ValueError(f"{name} has stride {logits.stride(-1)} in its last dimension; call .contiguous() on it")
    if not a.stream_words[1] + k < 2**32:
        raise ValueError(f"stream.position + k must be below 2^32, got {a.stream_words[1]} + {k}")
    if not (torch.compiler.is_compiling() or isinstance(target, torch._subclasses.FakeTensor) or target.is_meta):
        _check_values(a, k, V)


def _check_values(a: Arguments, k: int, V: int) -> None:
    lengths = a.lengths if a.lengths is not None else torch.full((len(a.draft_tokens),), k)
    if lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= k:
        raise ValueError(f"lengths must lie in 0..k={k}, got values from {int(lengths.min())} to {int(lengths.max())}")
    drafts = a.draft_tokens[torch.arange(k, device=a.draft_tokens.device) < lengths.to(a.draft_tokens.device)[:, None]]
    if drafts.numel() and not 0 <= int(drafts.min()) <= int(drafts.max()) < V:
        raise ValueError(
            f"draft_tokens must lie in 0..V-1={V - 1}, got values from {int(drafts.min())} to {int(drafts.max())}"
        )
