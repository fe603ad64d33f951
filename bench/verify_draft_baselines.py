"""The problem that draft verification is benched on, and what a user would otherwise write."""

import functools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pyquiet.kernels import verify_draft
from pyquiet.randomness import Purpose, Stream, draw, uniforms

STREAM = Stream(0)


@dataclass(frozen=True)
class Problem:
    """Rows of a draft and of a target near it, drafts drawn from theirs, and the uniforms of `STREAM`."""

    target: Tensor  # [B, k + 1, V]
    draft: Tensor  # [B, k, V]
    tokens: Tensor  # [B, k]
    lse: Tensor  # [B, k]
    log_u: Tensor  # [B, k], of the tests
    u: Tensor  # [B, k + 1], of what is drawn at each row

    @classmethod
    @functools.lru_cache(maxsize=1)
    def make(cls, B: int, k: int, V: int, dtype: torch.dtype, device: str = "cuda") -> "Problem":
        """Return the problem that all methods of a shape are given; some four in five drafts are accepted."""
        g = torch.Generator(device).manual_seed(0)
        target = 3 * torch.randn(B, k + 1, V, generator=g, device=device)
        draft = target[:, :k] + 0.3 * torch.randn(B, k, V, generator=g, device=device)
        target, draft = target.to(dtype), draft.to(dtype)
        drawn = draw(draft.view(B * k, V).float(), stream=Stream(0, Purpose.DRAFT))
        sequence, position = torch.arange(B).repeat_interleave(k + 1), torch.arange(k + 1).repeat(B)

        def of(purpose: Purpose) -> Tensor:
            return uniforms(Stream(0, purpose, sequence, position), B * (k + 1)).view(B, k + 1).to(device)

        u = torch.cat([of(Purpose.RESIDUAL)[:, :k], of(Purpose.BONUS)[:, k:]], 1)
        log_u = of(Purpose.ACCEPT)[:, :k].log()
        return cls(target, draft, drawn.tokens.view(B, k), drawn.lse.view(B, k), log_u, u)

    def to(self, device: str) -> "Problem":
        """Return a copy on a device."""
        return Problem(*(getattr(self, field.name).to(device) for field in fields(self)))

    def sequence(self, b: int) -> "Problem":
        """Return sequence b alone."""
        return Problem(*(getattr(self, field.name)[b : b + 1] for field in fields(self)))


def assemble(given: Problem, kept: Tensor, last: Tensor) -> Tensor:
    """Return tokens [B, k + 1]: `kept` [B] drafts, then `last` [B], then -1."""
    column = torch.arange(given.u.shape[1], device=kept.device)
    drafts = torch.nn.functional.pad(given.tokens, (0, 1))
    tokens = torch.where(column < kept[:, None], drafts, -1)
    return torch.where(column == kept[:, None], last[:, None], tokens)


def race(given: Problem) -> Tensor:
    """Both softmaxes, then the race of exponentials over what each row would leave: speculative decoding in vLLM."""
    q, p = given.target.softmax(-1, torch.float32), given.draft.softmax(-1, torch.float32)
    ids = given.tokens[..., None]
    accepted = given.log_u.exp() * p.gather(-1, ids)[..., 0] < q[:, :-1].gather(-1, ids)[..., 0]
    kept = accepted.long().cumprod(1).sum(1)
    q[:, :-1] = (q[:, :-1] - p).clamp_min_(0)
    noise = torch.empty_like(q[:, 0]).exponential_()
    return assemble(given, kept, (q / noise[:, None]).argmax(-1).gather(1, kept[:, None])[:, 0])


def multinomial(given: Problem) -> Tensor:
    """Both softmaxes, the residuals of all rows, one draw from each by torch.multinomial."""
    q, p = given.target.softmax(-1, torch.float32), given.draft.softmax(-1, torch.float32)
    ids = given.tokens[..., None]
    accepted = given.log_u.exp() * p.gather(-1, ids)[..., 0] < q[:, : p.shape[1]].gather(-1, ids)[..., 0]
    kept = accepted.long().cumprod(1).sum(1)
    q[:, : p.shape[1]] = (q[:, : p.shape[1]] - p).clamp_min_(0)
    drawn = q.flatten(0, 1).multinomial(1).view(q.shape[:2])
    return assemble(given, kept, drawn.gather(1, kept[:, None])[:, 0])


def cdf(given: Problem, dtype: torch.dtype = torch.float32) -> Tensor:
    """Log-sum-exps and gathers, then the CDF of the one row that is drawn from: as little as torch can do."""
    k, V = given.draft.shape[1:]
    q_lse, p_lse = given.target.to(dtype).logsumexp(-1), given.draft.to(dtype).logsumexp(-1)
    ids = given.tokens[..., None]
    log_q = given.target[:, :k].gather(-1, ids)[..., 0].to(dtype) - q_lse[:, :k]
    log_p = given.draft.gather(-1, ids)[..., 0].to(dtype) - p_lse
    kept = (given.log_u.to(dtype) < log_q - log_p).long().cumprod(1).sum(1)
    row, other = kept[:, None], kept.clamp_max(k - 1)[:, None]
    weights = (given.target.gather(1, row[..., None].expand(-1, -1, V))[:, 0].to(dtype) - q_lse.gather(1, row)).exp()
    taken = (given.draft.gather(1, other[..., None].expand(-1, -1, V))[:, 0].to(dtype) - p_lse.gather(1, other)).exp()
    sums = (weights - taken * (row < k)).clamp_min(0).cumsum(-1)
    limit = given.u.gather(1, row).to(dtype) * sums[:, -1:]
    return assemble(given, kept, torch.searchsorted(sums, limit, right=True)[:, 0].clamp_max(V - 1))


def ours(given: Problem, lse: Tensor | None = None) -> Tensor:
    return verify_draft(given.target, given.draft, given.tokens, stream=STREAM, draft_lse=lse).tokens


def check(given: Problem, tokens: Tensor, method: str) -> None:
    """Raise unless it keeps what float64 keeps and, where the same uniform serves, draws the same.

    One draw in eight may differ: in a CDF of float32 sums, ids of small weight change places.
    """
    B, tokens = len(tokens), tokens.to(given.target.device)
    expected = torch.cat([cdf(given.sequence(b), torch.float64) for b in range(B)])
    assert torch.equal(tokens < 0, expected < 0), f"{method} keeps other drafts than float64"
    other = (tokens != expected).sum().item()
    assert method in ("race", "multinomial") or other <= B / 8, f"{method} draws {other} other tokens than float64"
