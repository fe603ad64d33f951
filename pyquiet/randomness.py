"""Random numbers by address, and the draws made of them.

A random number here has an address, not a predecessor: Philox4x32-10 (Salmon et al., SC 2011)
under the 64-bit seed, at the counter (sequence, position, step, purpose << 26 | index). So a draw
does not depend on the batch it sits in, on the order of the draws or on the device, and no global
generator is read or written, but for one integer where a caller passes `seed=None`
(`resolve_seed`).
"""

import enum
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyquiet import native

_LIMITS = {"sequence": 1 << 32, "position": 1 << 32, "step": 1 << 32, "index": 1 << 26}
_CHUNK = 1 << 20  # float64 elements in flight in a draw: 8 MB


class Purpose(enum.IntEnum):
    """What a random number is for; two purposes never share a number."""

    THOUGHT = 0
    ANSWER = 1
    DRAFT = 2
    ACCEPT = 3
    RESIDUAL = 4
    BONUS = 5
    CANDIDATE = 6
    REVEAL = 7
    RESAMPLE = 8
    GUMBEL = 9
    EPOCH = 10
    CROP = 11


@dataclass(frozen=True, eq=False)
class Stream:
    """The addresses of one random number for each of R rows.

    `sequence` (None: the row number), `position` and `step` lie in [0, 2^32), `index` in [0,
    2^26); each is an int or an integer tensor of shape [R], [1] or []. `seed` lies in [-2^63,
    2^64); -1 and 2^64 - 1 are the same seed. `purpose` None leaves the choice to the function
    that gets the stream.

    Raises ValueError for a seed or an int out of range (tensors are checked when they are used),
    TypeError for what is neither an int nor an integer tensor.
    """

    seed: int
    purpose: Purpose | None = None
    sequence: Tensor | int | None = None
    position: Tensor | int = 0
    step: Tensor | int = 0
    index: Tensor | int = 0

    def __post_init__(self) -> None:
        _check_seed(self.seed)
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, Tensor):
                if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
                    raise TypeError(f"stream.{name} must hold integers, got {value.dtype}")
            elif value is not None and not 0 <= _integer(f"stream.{name}", value) < limit:
                raise ValueError(f"stream.{name} must be in [0, {limit}), got {value}")


@dataclass(frozen=True)
class Drawn:
    """One token a row, int64 [R], and its natural log-probability [R] under the law of the draw."""

    tokens: Tensor
    log_probs: Tensor


def resolve_seed(seed: int | None) -> int:
    """The seed itself; for None, one non-negative int64 taken from torch's default generator.

    Raises ValueError for a seed outside [-2^63, 2^64), TypeError for what is no integer.
    """
    if seed is None:
        return int(torch.empty((), dtype=torch.int64).random_())
    return _check_seed(seed)


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed of 52 bits for an epoch of training, so that a text's noise differs from epoch to epoch."""
    return int(uniforms(Stream(seed, Purpose.EPOCH, position=epoch), 1).item() * 2**52)


def uniforms(stream: Stream, rows: int, device: torch.device | str | None = None) -> Tensor:
    """Uniforms in the open interval (0, 1), float64 [rows], on `device` (None: the CPU).

    u = ((x >> 12) + 1/2) 2^-52 with x = 2^32 word1 + word0 of the Philox block: exact, so native
    code and torch agree to the last bit on every device.

    Raises ValueError where the stream has no purpose, or a tensor of it does not fit `rows` or is
    out of range.
    """
    if stream.purpose is None:
        raise ValueError("stream.purpose is None: say what the numbers are for, e.g. Purpose.ANSWER")
    device = torch.device("cpu" if device is None else device)
    words = [_counter_word(stream, name, rows, device) for name in _LIMITS]
    if device.type != "cpu" or native.cpu is None:
        return _reference_uniforms(stream.seed, stream.purpose, words, rows, device)
    out = torch.empty(rows, dtype=torch.float64)
    fields = [(w.data_ptr(), 0) if isinstance(w, Tensor) else (0, w) for w in words]
    native.cpu.uniforms(out.data_ptr(), rows, stream.seed % 2**64, stream.purpose, *fields)
    return out


def process_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    banned: Tensor | None = None,
) -> Tensor:
    """Logits [R, V] of the law that a token is drawn from: float32, or float64 for float64 logits.

    In this order: ids where `banned` (bool [V]) is true are removed; logits are multiplied by 1 /
    temperature (0: only the largest is kept, the lowest id of equal ones); `top_k` keeps the k
    largest; `top_p` keeps the fewest of the largest whose probabilities, after all of this, sum
    to top_p or more. All ids that equal a threshold are kept. A removed id has -inf. Where
    nothing is to be done the input itself is returned.

    Raises ValueError or TypeError for arguments out of range. The logits' values are not checked.
    """
    _check_arguments(logits, temperature, top_k, top_p, banned)
    return _process(logits, temperature, top_k, top_p, banned)


@torch.no_grad()
def draw(
    logits: Tensor,
    *,
    stream: Stream,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    banned: Tensor | None = None,
) -> Drawn:
    """One token for each row of logits [R, V], drawn from softmax(process_logits(logits, ...)).

    Exact inverse CDF in vocabulary order in float64: the first id whose cumulative weight exceeds
    u times the total, u the row's uniform from `stream` (whose purpose must be set). A token of
    probability zero is never returned. At temperature 0 the largest logit wins, the lowest id of
    equal ones, and log_probs is 0. `log_probs` is float32, or float64 for float64 logits, and
    carries no gradient.

    >>> stream = Stream(0, Purpose.ANSWER, sequence=torch.tensor([7]), position=3)
    >>> draw(torch.tensor([[0.0, 1.0, -torch.inf]]), stream=stream, top_p=0.9).tokens
    tensor([1])

    Raises ValueError for a row that holds NaN or +inf or has no id left, naming it, and for
    arguments out of range; TypeError for logits that are not floating point.
    """
    _check_arguments(logits, temperature, top_k, top_p, banned)
    rows = logits.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    log_probs = torch.zeros(rows, dtype=dtype, device=logits.device)
    u = uniforms(stream, rows, logits.device)
    for part in _row_chunks(logits):
        given = logits[part]
        top = _row_maxima(given, part.start)
        law = _process(given, temperature, top_k, top_p, banned)
        if law is not given:
            top = _row_maxima(law, part.start)
        if temperature == 0:
            tokens[part] = law.argmax(-1)
            continue
        weights = (law - top.double().unsqueeze(-1)).exp_()  # [r, V] float64
        cdf = weights.cumsum(-1)
        chosen = _invert(cdf, weights, u[part])
        tokens[part] = chosen
        score = law.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).double()
        log_probs[part] = (score - top - cdf[:, -1].log()).to(dtype)
    return Drawn(tokens, log_probs)


def _invert(cdf: Tensor, weights: Tensor, u: Tensor) -> Tensor:
    """The first ids whose cumulative weight exceeds u [R] times the total; cdf, weights [R, V]."""
    threshold = (u * cdf[:, -1]).unsqueeze(-1)
    ids = torch.searchsorted(cdf, threshold, right=True)
    # A parallel scan need not rise to the last bit, and may then point at an id of weight zero.
    stray = weights.gather(-1, ids) == 0
    if stray.any():
        ids = torch.where(stray, weights.argmax(-1, keepdim=True), ids)
    return ids.squeeze(-1)


def _process(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    banned: Tensor | None,
) -> Tensor:
    if logits.dtype != torch.float64:
        logits = logits.float()
    if banned is not None:
        logits = logits.masked_fill(banned, -math.inf)
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter_(-1, best, logits.gather(-1, best))
    if temperature != 1:
        logits = logits * (1 / temperature)
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, -math.inf)
    if top_p is not None and top_p < 1:
        logits = logits.masked_fill(logits < _top_p_threshold(logits, top_p), -math.inf)
    return logits


def _top_p_threshold(logits: Tensor, top_p: float) -> Tensor:
    """The smallest logit that top-p keeps, [R, 1]."""
    thresholds = []
    for part in _row_chunks(logits):
        ordered = logits[part].sort(-1, descending=True).values
        mass = ordered.softmax(-1, dtype=torch.float64).cumsum_(-1)
        last = (mass < top_p).sum(-1, keepdim=True).clamp_(max=logits.shape[-1] - 1)
        thresholds.append(ordered.gather(-1, last))
    return torch.cat(thresholds) if thresholds else logits.new_empty(0, 1)


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    """Rows in portions small enough for float64 copies. No result depends on the portions."""
    rows, vocabulary = logits.shape
    step = max(1, _CHUNK // vocabulary)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _row_maxima(logits: Tensor, first_row: int) -> Tensor:
    """The largest logit of each row, [R]; ValueError, naming the row, unless it is finite."""
    top = logits.amax(-1)  # NaN wins over all
    finite = top.isfinite()
    if not finite.all():
        row = int((~finite).nonzero()[0])
        worst = float(top[row])
        reason = "has no id left to draw (all are -inf)" if worst < 0 else f"holds {worst}"
        raise ValueError(f"logits: row {first_row + row} {reason}; every row needs a finite law")
    return top


def _check_arguments(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    banned: Tensor | None,
) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [R, V] with V >= 1, got {list(logits.shape)}")
    # 1 / temperature must neither overflow nor vanish in float32.
    if not (temperature == 0 or 1e-37 <= temperature <= 1e37):
        raise ValueError(f"temperature must be 0 (greedy) or in [1e-37, 1e37], got {temperature}")
    if top_k is not None and _integer("top_k", top_k) < 1:
        raise ValueError(f"top_k must be at least 1, or None to keep all ids, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], or None to keep all ids, got {top_p}")
    if banned is not None and (banned.dtype != torch.bool or banned.shape != logits.shape[1:]):
        raise ValueError(
            f"banned must be bool of shape [V] = [{logits.shape[1]}], got {banned.dtype} of shape {list(banned.shape)}"
        )


def _integer(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]  # asks for __index__ at run time
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _check_seed(seed: int) -> int:
    seed = _integer("seed", seed)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be in [-2^63, 2^64), got {seed}")
    return seed


def _counter_word(stream: Stream, name: str, rows: int, device: torch.device) -> Tensor | int:
    """One field of the stream: an int, or a contiguous int64 tensor [rows] on the device."""
    value = getattr(stream, name)
    if value is None:
        return torch.arange(rows, device=device)
    if not isinstance(value, Tensor):
        return operator.index(value)
    if value.dim() > 1 or value.numel() not in (1, rows):
        raise ValueError(f"stream.{name} must have shape [{rows}], got {list(value.shape)}")
    return value.to(device, torch.int64).expand(rows).contiguous()


def _reference_uniforms(seed: int, purpose: int, words: list[Tensor | int], rows: int, device: torch.device) -> Tensor:
    counter = torch.stack(
        [w if isinstance(w, Tensor) else torch.full((rows,), w, dtype=torch.int64, device=device) for w in words]
    )  # [4, R]
    limits = torch.tensor(list(_LIMITS.values()), device=device).unsqueeze(-1)
    wrong = (counter < 0) | (counter >= limits)
    if wrong.any():
        field, row = wrong.nonzero()[0].tolist()
        name, limit = list(_LIMITS.items())[field]
        value = int(counter[field, row])
        raise ValueError(f"stream.{name} must be in [0, {limit}), got {value} at row {row}")
    counter[3] |= purpose << 26
    block = _philox(seed, counter)
    x = block[1] << 32 | block[0]
    return ((x >> 12 & (1 << 52) - 1).double() + 0.5) * 2.0**-52


def _philox(seed: int, counter: Tensor) -> Tensor:
    """Ten rounds of Philox4x32: counter int64 [4, ...] of 32-bit words -> the same of the block."""
    low = (1 << 32) - 1
    key0, key1 = seed & low, seed >> 32 & low
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # int64 products wrap modulo 2^64; the mask makes the arithmetic shift a logical one.
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (odd >> 32 & low) ^ c1 ^ key0,
            odd & low,
            (even >> 32 & low) ^ c3 ^ key1,
            even & low,
        )
        key0, key1 = key0 + 0x9E3779B9 & low, key1 + 0xBB67AE85 & low
    return torch.stack([c0, c1, c2, c3])
