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
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyquiet.checks import check_number, check_word
from pyquiet.native import cpu
from pyquiet.philox import LIMITS, make_counter, philox, reference_uniforms, uniform

MAX_VOCABULARY = 1 << 24  # of native draws: sums of their integer weights stay below 2^64
_CHUNK = 1 << 20  # float64 elements in flight in a draw: 8 MB

Fields = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
COUPLINGS = ("rejection", "gumbel")


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
        object.__setattr__(self, "seed", _check_seed(self.seed))  # an int, whatever integer it was
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, Tensor):
                if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
                    raise TypeError(f"stream.{name} must hold integers, got {value.dtype}")
            elif value is not None and not 0 <= _integer(f"stream.{name}", value) < limit:
                raise ValueError(f"stream.{name} must be in [0, {limit}), got {value}")


@dataclass(frozen=True)
class Drawn:
    """One token a row, int64 [R], its natural log-probability [R] under the law of the draw, and that law's `lse` [R].

    `lse` is the log-sum-exp of the processed logits; at temperature 0 it and `log_probs` are 0.
    """

    tokens: Tensor
    log_probs: Tensor
    lse: Tensor


def resolve_seed(seed: int | None) -> int:
    """The seed itself; for None, one non-negative int64 taken from torch's default generator.

    Raises ValueError for a seed outside [-2^63, 2^64), TypeError for what is no integer.
    """
    if seed is None:
        return int(torch.empty((), dtype=torch.int64).random_())
    return _check_seed(seed)


def resolve_sequence_ids(sequence_ids: Tensor | None, batch: int) -> Tensor:
    """The ids on the CPU, int64 [batch]; for None, the numbers of the rows. Errors as `check_sequence_ids`."""
    if sequence_ids is None:
        return torch.arange(batch)
    check_sequence_ids(sequence_ids, batch)
    return sequence_ids.cpu()


def check_sequence_ids(sequence_ids: Tensor, batch: int) -> None:
    """Raises TypeError or ValueError unless the ids are int64 [batch] in [0, 2^32), as a Stream takes them."""
    if not isinstance(sequence_ids, Tensor):
        raise TypeError(f"sequence_ids must be an int64 tensor, got {type(sequence_ids).__name__}")
    if sequence_ids.dtype != torch.int64 or sequence_ids.shape != (batch,):
        raise ValueError(
            f"sequence_ids must be int64 of shape [{batch}], one id a sequence, got {sequence_ids.dtype} "
            f"{list(sequence_ids.shape)}"
        )
    if (sequence_ids < 0).any() or (sequence_ids >= 2**32).any():
        raise ValueError(f"sequence_ids must lie in 0 .. 2^32 - 1, got {sequence_ids.min()} .. {sequence_ids.max()}")


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
    words = _counter_words(stream, rows, device)
    if device.type != "cpu" or cpu is None:
        return reference_uniforms(stream.seed, stream.purpose, words, rows, device)
    out = torch.empty(rows, dtype=torch.float64)
    fields = [(w.data_ptr(), 0) if isinstance(w, Tensor) else (0, w) for w in words]
    cpu.uniforms(out.data_ptr(), rows, stream.seed % 2**64, stream.purpose, *fields)
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
    _check_logits(logits)
    check_processing(logits.shape[1], temperature, top_k, top_p, banned)
    return _keep_largest(_scores(logits, temperature, banned), top_k, top_p)


@torch.no_grad()
def draw(
    logits: Tensor,
    *,
    stream: Stream,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    banned: Tensor | None = None,
    coupling: str = "rejection",
) -> Drawn:
    """One token for each row of logits [R, V], drawn from softmax(process_logits(logits, ...)).

    Exact inverse CDF in vocabulary order: the first id whose cumulative weight exceeds u times the total, u the row's
    uniform from `stream` (whose purpose must be set). A token of probability zero is never returned. At temperature 0
    the largest logit wins, the lowest id of equal ones. `log_probs` and `lse` are float32, or float64 for float64
    logits, and carry no gradient.

    With `coupling="gumbel"` the token is that of the largest score + Gumbel noise, whose address is the stream's
    without purpose and index: two laws that are close then draw the same token as often as they can be made to by
    noise alone (at least (1 - TV) / (1 + TV)), as `verify_draft` needs it.

    float32 and bfloat16 on the CPU run native code, with sums in float64; the rest, and CUDA, takes torch in float64.
    Their tokens are the same but for ties within rounding.

    >>> stream = Stream(0, Purpose.ANSWER, sequence=torch.tensor([7]), position=3)
    >>> draw(torch.tensor([[0.0, 1.0, -torch.inf]]), stream=stream, top_p=0.9).tokens
    tensor([1])

    Raises ValueError for a row that holds NaN or +inf at an id that is not banned or has no id left, naming it, and for
    arguments out of range; TypeError for logits that are not floating point.
    """
    _check_logits(logits)
    check_processing(logits.shape[1], temperature, top_k, top_p, banned)
    check_word("coupling", coupling, COUPLINGS)
    if stream.purpose is None and coupling == "rejection":
        raise ValueError("stream.purpose is None: say what the numbers are for, e.g. Purpose.ANSWER")
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    R = len(logits)
    tokens = torch.empty(R, 1, dtype=torch.int64, device=logits.device)
    log_probs, lse = (torch.zeros(shape, dtype=dtype, device=logits.device) for shape in ((R, 1), (R,)))
    drawn = Drawn(tokens.squeeze(1), log_probs.squeeze(1), lse)
    if not _draws_natively(logits):
        _draw_in_torch(drawn, logits, stream, temperature, top_k, top_p, banned, coupling == "gumbel")
        return drawn
    rows = logits if logits.stride(-1) == 1 else logits.contiguous()
    fields, words = counter_fields(stream, R, rows.device)
    options = (words, stream.seed % 2**64, stream.purpose or 0, temperature, top_k, top_p, coupling == "gumbel")
    fault = torch.empty(R, dtype=torch.int64)
    on_cpu: Callable[..., int] = cpu.draw
    banned = banned if banned is None else banned.contiguous()
    faults = on_cpu(rows, banned, *fields, *options, tokens, log_probs, lse, fault, torch.get_num_threads())
    assert faults >= 0, "the native draw refused what has been checked"
    if faults:
        row = int(fault.nonzero()[0])
        row_maxima(_scores(logits[row : row + 1], temperature, banned), row)
        raise AssertionError(f"the native draw found a fault in row {row} that has none")
    return drawn


def _draws_natively(logits: Tensor) -> bool:
    dtype = logits.dtype in (torch.float32, torch.bfloat16)
    return cpu is not None and logits.is_cpu and dtype and logits.shape[1] <= MAX_VOCABULARY


def _draw_in_torch(
    drawn: Drawn, logits: Tensor, stream: Stream, temperature: float,
    top_k: int | None, top_p: float | None, banned: Tensor | None, gumbel: bool,
) -> None:  # fmt: skip
    for part in row_chunks(logits):
        scores = _scores(logits[part], temperature, banned)
        top = row_maxima(scores, part.start)
        law = _keep_largest(scores, top_k, top_p)
        if temperature == 0:
            drawn.tokens[part] = law.argmax(-1)
            continue
        weights = (law - top.double().unsqueeze(-1)).exp_()  # [r, V] float64
        cdf = weights.cumsum(-1)
        words = [x[part] if isinstance(x, Tensor) else x for x in _counter_words(stream, len(logits), logits.device)]
        some = Stream(stream.seed, stream.purpose, *words)
        if gumbel:
            chosen = (law + gumbel_noise(some, len(law), law.shape[1], law.device)).argmax(-1)
        else:
            chosen = invert_cdf(cdf, weights, uniforms(some, len(law), law.device))
        lse = top + cdf[:, -1].log()
        drawn.tokens[part] = chosen
        drawn.lse[part] = lse.to(drawn.lse.dtype)
        score = law.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).double()
        drawn.log_probs[part] = (score - lse).to(drawn.lse.dtype)


def invert_cdf(cdf: Tensor, weights: Tensor, u: Tensor) -> Tensor:
    """The first ids whose cumulative weight exceeds u [R] or [R, k] times the total; cdf, weights [R, V]."""
    ids = torch.searchsorted(cdf, (u if u.dim() == 2 else u.unsqueeze(-1)) * cdf[:, -1:], right=True)
    # A parallel scan need not rise to the last bit, and may then point at an id of weight zero.
    stray = weights.gather(-1, ids.clamp_max(cdf.shape[1] - 1)) == 0
    if stray.is_cuda or stray.any():  # CUDA: to look would be to wait
        ids = torch.where(stray, weights.argmax(-1, keepdim=True), ids)
    return ids.reshape(u.shape)


def _scores(logits: Tensor, temperature: float, banned: Tensor | None) -> Tensor:
    if logits.dtype != torch.float64:
        logits = logits.float()
    if banned is not None:
        logits = logits.masked_fill(banned, -math.inf)
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter_(-1, best, logits.gather(-1, best))
    return logits if temperature == 1 else logits * (1 / temperature)


def _keep_largest(scores: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    if top_k is not None and top_k < scores.shape[-1]:
        threshold = scores.topk(top_k, sorted=False).values.amin(-1, keepdim=True)
        scores = scores.masked_fill(scores < threshold, -math.inf)
    if top_p is not None and top_p < 1:
        scores = scores.masked_fill(scores < _top_p_threshold(scores, top_p), -math.inf)
    return scores


def _top_p_threshold(logits: Tensor, top_p: float) -> Tensor:
    """The smallest logit that top-p keeps, [R, 1]."""
    thresholds = []
    for part in row_chunks(logits):
        ordered = logits[part].sort(-1, descending=True).values
        mass = ordered.softmax(-1, dtype=torch.float64).cumsum_(-1)
        last = (mass < top_p).sum(-1, keepdim=True).clamp_(max=logits.shape[-1] - 1)
        thresholds.append(ordered.gather(-1, last))
    return torch.cat(thresholds) if thresholds else logits.new_empty(0, 1)


def row_chunks(logits: Tensor) -> Iterator[slice]:
    """Rows in portions small enough for float64 copies. No result depends on the portions."""
    rows, vocabulary = logits.shape
    step = max(1, _CHUNK // vocabulary)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def check_row(logits: Tensor, name: str, temperature: float, banned: Tensor | None) -> None:
    """Raises ValueError, with the name, for a row of logits [1, V] that no token can be drawn from."""
    row_maxima(_scores(logits, temperature, banned), 0, name)


def row_maxima(scores: Tensor, first_row: int, name: str = "logits: row {}") -> Tensor:
    """The largest score of each row, [R]; ValueError, naming the row, unless it is finite."""
    top = scores.amax(-1)  # NaN wins over all
    finite = top.isfinite()
    if not finite.all():
        row = int((~finite).nonzero()[0])
        worst = float(top[row])
        reason = "has no id left to draw (all are -inf)" if worst < 0 else f"holds {worst}"
        raise ValueError(f"{name.format(first_row + row)} {reason}; every row needs a finite law")
    return top


def _check_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor [R, V], got {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have shape [R, V] with V >= 1, got {list(logits.shape)}")


def check_temperature(name: str, temperature: float) -> None:
    """Raises ValueError, by that name, unless 1 / temperature neither overflows nor vanishes in float32.

    TypeError for what is no number.
    """
    check_number(name, temperature)
    if not (temperature == 0 or 1e-37 <= temperature <= 1e37):
        raise ValueError(f"{name} must be 0 (greedy) or in [1e-37, 1e37], got {temperature}")


def check_processing(
    vocabulary: int, temperature: float, top_k: int | None = None, top_p: float | None = None,
    banned: Tensor | None = None, name: str = "temperature",
) -> None:  # fmt: skip
    """Raises ValueError or TypeError for arguments of `process_logits` out of range; `name` is the temperature's."""
    check_temperature(name, temperature)
    if top_k is not None and _integer("top_k", top_k) < 1:
        raise ValueError(f"top_k must be at least 1, or None to keep all ids, got {top_k}")
    if top_p is not None and not 0 < check_number("top_p", top_p) <= 1:
        raise ValueError(f"top_p must be in (0, 1], or None to keep all ids, got {top_p}")
    if not isinstance(banned, Tensor | None):
        raise TypeError(f"banned must be a bool tensor [V], or None, got {type(banned).__name__}")
    if banned is not None and (banned.dtype != torch.bool or banned.shape != (vocabulary,)):
        raise ValueError(
            f"banned must be bool of shape [V] = [{vocabulary}], got {banned.dtype} of shape {list(banned.shape)}"
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


def counter_fields(stream: Stream, rows: int, device: torch.device) -> tuple[Fields, list[int]]:
    """The fields as native code takes them: int64 tensors [rows] or None, and for None an int (-1: the row)."""
    values = [_counter_word(stream, name, rows, device) for name in LIMITS]
    sequence, position, step, index = (x if isinstance(x, Tensor) else None for x in values)
    return (sequence, position, step, index), [-1 if x is None else 0 if isinstance(x, Tensor) else x for x in values]


def _counter_words(stream: Stream, rows: int, device: torch.device) -> list[Tensor | int]:
    values = (_counter_word(stream, name, rows, device) for name in LIMITS)
    return [torch.arange(rows, device=device) if x is None else x for x in values]


def _counter_word(stream: Stream, name: str, rows: int, device: torch.device) -> Tensor | int | None:
    """One field of the stream: None for the row's number, an int, or a contiguous int64 tensor [rows] on the device."""
    value = getattr(stream, name)
    if value is None:
        return None
    if not isinstance(value, Tensor):
        return operator.index(value)
    if value.dim() > 1 or value.numel() not in (1, rows):
        raise ValueError(f"stream.{name} must have shape [{rows}], got {list(value.shape)}")
    return value.to(device, torch.int64).expand(rows).contiguous()


def gumbel_noise(stream: Stream, rows: int, vocabulary: int, device: torch.device | str | None = None) -> Tensor:
    """Gumbel noise -log(-log(u)) for every id of every row, float64 [rows, vocabulary], on `device` (None: the CPU).

    Token v reads half v % 2 of block v // 2 at the stream's address; its purpose and index are not used.
    """
    device = torch.device("cpu" if device is None else device)
    counter = make_counter(_counter_words(stream, rows, device), rows, device)
    counter[3] = Purpose.GUMBEL << 26
    blocks = counter.unsqueeze(-1).repeat(1, 1, (vocabulary + 1) // 2)  # [4, R, V / 2]
    blocks[3] += torch.arange(blocks.shape[-1], device=device)
    block = philox(stream.seed, blocks)
    u = torch.stack([uniform(block[0], block[1]), uniform(block[2], block[3])], -1)
    return u.flatten(1)[:, :vocabulary].log().neg_().log_().neg_()
