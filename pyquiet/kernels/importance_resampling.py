"""Importance resampling: k exact draws a row from one reading of its logits, and the pick of survivors by weight.

Letters: R rows, V vocabulary, k candidates, d hidden size, u a uniform, w a weight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from pyquiet.checks import check_count, check_word
from pyquiet.kernels.registration import Kernel, Tensors, check_tensor, left_to_check, reads_natively
from pyquiet.philox import LIMITS
from pyquiet.randomness import (
    MAX_VOCABULARY,
    Purpose,
    Stream,
    check_processing,
    check_row,
    counter_fields,
    invert_cdf,
    process_logits,
    row_chunks,
    row_maxima,
    uniforms,
)

SCHEMES = ("systematic", "multinomial", "stratified", "residual")
_LOGITS_IN_FLIGHT = 1 << 24  # bytes of the chunks of rows that hidden states are multiplied in


@dataclass(frozen=True)
class Candidates:
    """What `draw_candidates` returns, on the logits' device; float32, or float64 for float64 logits; no gradient.

    tokens: int64 [R, k].
    log_probs: [R, k], of the tokens under the law that they were drawn from; 0 at temperature 0.
    log_base: [R, k], of the tokens under softmax(logits), in which banned ids have -inf and nothing else is processed.
    lse: [R], the log-sum-exp of those logits.
    """

    tokens: Tensor
    log_probs: Tensor
    log_base: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Resampled:
    """What `resample` returns, on the weights' device; the last two in their dtype.

    indices: int64 [..., survivors], ascending.
    ess: [...], the effective sample size (sum w)^2 / sum w^2, in [1, k].
    log_normalizer: [...], the log of the mean weight.
    """

    indices: Tensor
    ess: Tensor
    log_normalizer: Tensor


class Arguments(NamedTuple):
    """The arguments of `draw_candidates` in the order of the op and of the native calls, the stream unpacked.

    stream_words: the fields of the stream that are ints, where its tensor is None; -1: the row's number.
    """

    logits: Tensor
    banned: Tensor | None
    stream_sequence: Tensor | None
    stream_position: Tensor | None
    stream_step: Tensor | None
    stream_index: Tensor | None
    stream_words: Sequence[int]
    seed: int
    purpose: int
    k: int
    temperature: float
    top_k: int | None
    top_p: float | None
    deterministic: bool

    def stream(self) -> Stream:
        tensors = (self.stream_sequence, self.stream_position, self.stream_step, self.stream_index)
        words = zip(tensors, self.stream_words, strict=True)
        sequence, position, step, index = (word if x is None else x for x, word in words)
        named = isinstance(sequence, Tensor) or sequence >= 0
        return Stream(self.seed, Purpose(self.purpose), sequence if named else None, position, step, index)


@torch.no_grad()
def draw_candidates(
    logits: Tensor,
    k: int,
    *,
    stream: Stream,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    banned: Tensor | None = None,
    deterministic: bool = False,
) -> Candidates:
    """k tokens for each row of logits [R, V], independent draws from softmax(process_logits(logits, ...)).

    Each is an exact draw with 52 bits of randomness, by inverse CDF in vocabulary order: candidate j of a row is the
    token of `randomness.draw` for the same processing and the same stream with j added to its index. The reading of the
    row, which costs the most, is shared by all of them. With a processed law as the proposal for softmax(logits), a
    candidate's importance weight is exp(log_base - log_probs).

    Args:
        logits: [R, V], floating point.
        k: candidates a row, at least 1.
        stream: an address for each row; purpose None is CANDIDATE. index + k must not exceed 2^26.
        temperature, top_k, top_p, banned: as in `process_logits`; at temperature 0 all candidates are the largest.
        deterministic: integer weights, so that CPU and CUDA return the same tokens bit for bit for the same logits.

    float32 and bfloat16, on CUDA float16 too, run native kernels, whose tokens are those of float64 but for ties within
    rounding; the rest takes `reference`. On CUDA the call waits once, for what the kernel says of the rows.

    >>> draw_candidates(torch.tensor([[0.0, 1.0, -torch.inf]]), 4, stream=Stream(0)).tokens
    tensor([[1, 1, 1, 1]])

    Raises:
        TypeError, ValueError: an argument is out of range, or a row holds NaN or +inf at an id that is not banned or
            has no id left; the message names it.
    """
    arguments = _arguments(logits, k, stream, temperature, top_k, top_p, banned, deterministic)
    *drawn, fault = _kernel(arguments)
    if left_to_check(fault):
        _raise_fault(arguments, fault)
    return Candidates(*drawn)


@torch.no_grad()
def draw_candidates_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    stream: Stream,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    banned: Tensor | None = None,
    deterministic: bool = False,
) -> Candidates:
    """`draw_candidates` of the logits `linear(hidden, weight, bias)`, of which no more than 16 MB exist at a time.

    Args:
        hidden: [R, d].
        weight: [V, d] of the same dtype, the weight of the language model's head.
        bias: [V].

    The rest, and what is raised, as in `draw_candidates`.
    """
    if not (isinstance(hidden, Tensor) and isinstance(weight, Tensor)):
        raise TypeError(f"hidden and weight must be tensors, got {_described(hidden)} and {_described(weight)}")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [R, d] and weight [V, d], got {list(hidden.shape)} and {list(weight.shape)}; "
            "flatten the leading dimensions of hidden"
        )

    def of(part: slice) -> Arguments:
        logits, some = linear(hidden[part], weight, bias), _rows_of(stream, part, len(hidden))
        return _arguments(logits, k, some, temperature, top_k, top_p, banned, deterministic)

    step = max(1, _LOGITS_IN_FLIGHT // max(1, len(weight) * weight.element_size()))
    parts = []
    for start in range(0, max(1, len(hidden)), step):
        try:
            parts.append(_kernel(of(slice(start, start + step))))
        except ValueError as error:
            if start == 0:
                raise
            raise ValueError(f"{error}; its logits were counted from row {start} of hidden") from error
    *drawn, fault = (torch.cat(x) for x in zip(*parts, strict=True))
    if left_to_check(fault) and fault.any():
        row = int(fault.nonzero()[0])
        _raise_fault(of(slice(row, row + 1)), fault[row : row + 1], row)
    return Candidates(*drawn)


def _rows_of(stream: Stream, part: slice, rows: int) -> Stream:
    """The stream of some of its rows."""
    sequence = torch.arange(rows) if stream.sequence is None else stream.sequence
    sequence, position, step, index = (
        x[part] if isinstance(x, Tensor) and x.shape == (rows,) else x
        for x in (sequence, stream.position, stream.step, stream.index)
    )
    return Stream(stream.seed, stream.purpose, sequence, position, step, index)


def _arguments(
    logits: Tensor, k: int, stream: Stream, temperature: float,
    top_k: int | None, top_p: float | None, banned: Tensor | None, deterministic: bool,
) -> Arguments:  # fmt: skip
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise TypeError(f"logits must be a tensor [R, V], got {_described(logits)}")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tensors, words = counter_fields(stream, len(logits), logits.device)
    return Arguments(
        logits,
        banned.contiguous() if isinstance(banned, Tensor) else banned,
        *tensors,
        stream_words=words,
        seed=stream.seed if stream.seed < 2**63 else stream.seed - 2**64,
        purpose=Purpose.CANDIDATE if stream.purpose is None else stream.purpose,
        k=k,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        deterministic=deterministic,
    )


def _described(x: Any) -> str:
    return f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def reference(*arguments: Any) -> Tensors:
    """The slow, obvious twin of the kernel: its arguments -> tokens, log_probs, log_base, lse, fault (zeros).

    Laws and cumulative sums are in float64, so `deterministic` changes nothing here.
    """
    a = Arguments(*arguments)
    _check(a)
    tokens, log_probs, log_base, lse, fault = (x.zero_() for x in _fake(arguments))
    u = _uniforms(a.stream(), len(a.logits), a.k, a.logits.device)
    for part in row_chunks(a.logits):
        base = process_logits(a.logits[part], banned=a.banned).double()
        law = process_logits(
            a.logits[part], temperature=a.temperature, top_k=a.top_k, top_p=a.top_p, banned=a.banned
        ).double()
        top = row_maxima(law, part.start).unsqueeze(-1)
        weights = (law - top).exp_()
        cdf = weights.cumsum(-1)
        chosen = law.argmax(-1, keepdim=True).expand(-1, a.k)
        if a.temperature != 0:
            chosen = invert_cdf(cdf, weights, u[part])
            log_probs[part] = (law.gather(-1, chosen) - top - cdf[:, -1:].log()).to(lse.dtype)
        exact_lse = base.logsumexp(-1, keepdim=True)
        tokens[part], lse[part] = chosen, exact_lse.squeeze(-1).to(lse.dtype)
        log_base[part] = (base.gather(-1, chosen) - exact_lse).to(lse.dtype)
    return tokens, log_probs, log_base, lse, fault


def _uniforms(stream: Stream, rows: int, count: int, device: torch.device) -> Tensor:
    """The uniforms of each row's next `count` indices, float64 [rows, count]."""
    tensors, words = counter_fields(stream, rows, device)
    if words[0] == -1:
        tensors = (torch.arange(rows, device=device), *tensors[1:])
    sequence, position, step, index = (
        word if x is None else x.repeat_interleave(count) for x, word in zip(tensors, words, strict=True)
    )
    ahead = index + torch.arange(count, device=device).repeat(rows)
    each = Stream(stream.seed, stream.purpose, sequence, position, step, ahead)
    return uniforms(each, rows * count, device).view(rows, count)


def _forward(arguments: tuple[Any, ...], all_outputs: bool) -> Tensors:
    logits: Tensor = arguments[0]
    if logits.is_meta:
        return _fake(arguments)
    if not reads_natively(logits):
        return reference(*arguments)
    return _kernel.read_rows(arguments, _fake(arguments), logits.shape, _raise_fault)


def _fake(arguments: tuple[Any, ...]) -> Tensors:
    a = Arguments(*arguments)
    new, R = a.logits.new_empty, len(a.logits)
    dtype = torch.float64 if a.logits.dtype is torch.float64 else torch.float32
    log_probs, lse = new((R, a.k), dtype=dtype), new(R, dtype=dtype)
    tokens, fault = new((R, a.k), dtype=torch.int64), new(R, dtype=torch.int64)
    return tokens, log_probs, torch.empty_like(log_probs), lse, fault


_kernel = Kernel(
    "draw_candidates",
    Arguments,
    outputs=5,
    forward=_forward,
    fake=_fake,
    check=lambda arguments: _check(Arguments(*arguments)),
)


def _raise_fault(arguments: tuple[Any, ...], fault: Tensor, first: int = 0) -> None:
    """Raises what is wrong with the first row that a kernel marked; `first`: what the caller counts rows from."""
    if fault.any():
        a = Arguments(*arguments)
        row = int(fault.nonzero()[0])
        if fault[row] < 0:  # an address out of range, which on CUDA the kernel is the first to see
            uniforms(a.stream(), len(a.logits), a.logits.device)
            index = a.stream_words[3] if a.stream_index is None else int(a.stream_index[row])
            limit = LIMITS["index"] + 1 - a.k
            raise ValueError(f"stream.index must be in [0, {limit}), got {index} at row {first + row}")
        check_row(a.logits[row : row + 1], f"logits: row {first + row}", a.temperature, a.banned)
        raise AssertionError(f"the kernel found a fault in row {row} that has none")


def _check(a: Arguments) -> None:
    logits = a.logits
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if not 1 <= logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(f"logits must have shape [R, V] with 1 <= V <= 2^24, got {list(logits.shape)}")
    check_count("k", a.k, least=1)
    check_processing(logits.shape[1], a.temperature, a.top_k, a.top_p, a.banned)
    if a.banned is not None:
        check_tensor("banned", a.banned, (logits.shape[1],), torch.bool, "logits", logits.device)
    if not a.stream_words[3] + a.k <= LIMITS["index"]:
        raise ValueError(f"stream.index + k must be at most 2^26, got {a.stream_words[3]} + {a.k}")


@torch.no_grad()
def resample(log_weights: Tensor, *, survivors: int = 1, scheme: str = "systematic", stream: Stream) -> Resampled:
    """Picks `survivors` of k candidates, with replacement: candidate i, in expectation, survivors * w_i / sum(w) times.

    The schemes are one law for one survivor; for more they differ in spread:
    "multinomial" draws independently; "stratified" draws one from each of equal parts of the CDF; "systematic" the
    same with one uniform for all parts, so that counts differ from their expectation by less than 1; "residual" first
    takes each candidate floor(survivors * w_i / sum(w)) times and draws the rest independently.

    Args:
        log_weights: [..., k], float32 or float64, natural logs, up to a constant a row; -inf is a weight of zero. Where
            all of a row are -inf the pick is uniform, log_normalizer -inf and ess k. Cumulative sums are in float64.
        stream: an address for each row (the leading dimensions, flattened); purpose None is RESAMPLE. "systematic"
            takes the uniform at its index, the others that at index + i for the i-th draw.

    >>> resample(torch.tensor([0.0, -torch.inf, 0.0]), survivors=2, stream=Stream(0)).indices
    tensor([0, 2])

    Raises:
        TypeError, ValueError: an argument is out of range, or a row of weights holds NaN or +inf; the message names it.
    """
    _check_resample(log_weights, survivors, scheme)
    if stream.purpose is None:
        stream = replace(stream, purpose=Purpose.RESAMPLE)
    shape, k = log_weights.shape[:-1], log_weights.shape[-1]
    lw = log_weights.reshape(shape.numel(), k).double()
    top = lw.amax(-1, keepdim=True)
    if not bool((top < math.inf).all()):  # NaN wins over all
        row = int((~(top < math.inf)).nonzero()[0, 0])
        raise ValueError(f"log_weights: row {row} of {len(lw)} holds {top[row].item()}; they must be finite or -inf")
    weights = torch.where(top == -math.inf, 0.0, lw - top).exp_()  # [R, k]
    u = _uniforms(stream, len(lw), 1 if scheme == "systematic" else survivors, lw.device)
    indices = _residual(weights, u) if scheme == "residual" else _pick(weights, u, survivors, scheme)
    total = weights.sum(-1)
    ess = total.square() / weights.square().sum(-1)
    log_normalizer = top.squeeze(-1) + (total / k).log()
    return Resampled(
        indices.view(*shape, survivors),
        ess.to(log_weights.dtype).view(shape),
        log_normalizer.to(log_weights.dtype).view(shape),
    )


def _pick(weights: Tensor, u: Tensor, survivors: int, scheme: str) -> Tensor:
    if scheme != "multinomial" and survivors > 1:
        u = (torch.arange(survivors, device=u.device) + u) / survivors
    indices = invert_cdf(weights.cumsum(-1), weights, u)
    return indices.sort(-1).values if survivors > 1 else indices


def _residual(weights: Tensor, u: Tensor) -> Tensor:
    survivors = u.shape[1]
    expected = weights * (survivors / weights.sum(-1, keepdim=True))
    counts = expected.floor()
    rest = expected - counts
    missing = survivors - counts.sum(-1, keepdim=True)
    drawn = invert_cdf(rest.cumsum(-1), rest, u)
    counts.scatter_add_(-1, drawn, (torch.arange(survivors, device=u.device) < missing).to(counts.dtype))
    places = torch.arange(survivors, device=u.device, dtype=counts.dtype).expand(len(u), -1).contiguous()
    return torch.searchsorted(counts.cumsum(-1), places, right=True)


def ess(log_weights: Tensor) -> Tensor:
    """The effective sample size (sum w)^2 / sum w^2 of log-weights [..., k], in [1, k]; [...]; k where all are -inf."""
    none = (log_weights == -math.inf).all(-1, keepdim=True)
    lw = torch.where(none, 0.0, log_weights)
    return (2 * lw.logsumexp(-1) - (2 * lw).logsumexp(-1)).exp()


def _check_resample(log_weights: Tensor, survivors: int, scheme: str) -> None:
    if not isinstance(log_weights, Tensor) or log_weights.dtype not in (torch.float32, torch.float64):
        got = log_weights.dtype if isinstance(log_weights, Tensor) else type(log_weights).__name__
        raise TypeError(f"log_weights must be a float32 or float64 tensor, got {got}; convert it with .float()")
    if log_weights.ndim == 0 or log_weights.shape[-1] == 0:
        raise ValueError(f"log_weights must be [..., k] with k >= 1, got shape {list(log_weights.shape)}")
    check_count("survivors", survivors, least=1)
    check_word("scheme", scheme, SCHEMES)
