"""The problem that draws of candidates are benched on, and what a user would otherwise write."""

import functools
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pyquiet.kernels import draw_candidates
from pyquiet.randomness import Purpose, Stream, uniforms

STREAM = Stream(0)


@dataclass(frozen=True)
class Problem:
    """Rows of logits, and the uniforms of `STREAM`."""

    logits: Tensor  # [R, V]
    u: Tensor  # [R, k]

    @classmethod
    @functools.lru_cache(maxsize=1)
    def make(cls, R: int, k: int, V: int, dtype: torch.dtype, device: str = "cuda") -> "Problem":
        """Return the problem that all methods of a shape are given."""
        logits = 3 * torch.randn(R, V, generator=torch.Generator(device).manual_seed(0), device=device)
        row, index = torch.arange(R).repeat_interleave(k), torch.arange(k).repeat(R)
        u = uniforms(Stream(STREAM.seed, Purpose.CANDIDATE, row, index=index), R * k)
        return cls(logits.to(dtype), u.view(R, k).to(device))

    def to(self, device: str) -> "Problem":
        """Return a copy on a device."""
        return Problem(*(getattr(self, field.name).to(device) for field in fields(self)))


Drawn = tuple[Tensor, Tensor]  # tokens [R, k] and their log-probabilities


def ours(given: Problem) -> Drawn:
    drawn = draw_candidates(given.logits, given.u.shape[1], stream=STREAM)
    return drawn.tokens, drawn.log_probs


def multinomial(given: Problem) -> Drawn:
    """A softmax, then k draws by torch.multinomial, which searches in a CDF."""
    probs = given.logits.softmax(-1, torch.float32)
    tokens = probs.multinomial(given.u.shape[1], replacement=True)
    return tokens, probs.gather(-1, tokens).log()


def race(given: Problem) -> Drawn:
    """A softmax, then for each candidate a race of exponentials over all ids, as released samplers run it."""
    probs = given.logits.softmax(-1, torch.float32)
    noise = torch.empty_like(probs)
    draws = [torch.div(probs, noise.exponential_(), out=noise).argmax(-1) for _ in range(given.u.shape[1])]
    tokens = torch.stack(draws, -1)
    return tokens, probs.gather(-1, tokens).log()


def cdf(given: Problem, dtype: torch.dtype = torch.float32) -> Drawn:
    """The CDF of each row, and k searches in it: as little as torch can do."""
    probs = given.logits.softmax(-1, dtype)
    sums = probs.cumsum(-1)
    tokens = torch.searchsorted(sums, given.u.to(dtype) * sums[:, -1:], right=True).clamp_max(sums.shape[1] - 1)
    return tokens, probs.gather(-1, tokens).log()


def check(given: Problem, drawn: Drawn, method: str) -> None:
    """Raise unless log-probabilities are those of float64 and, where the same uniforms serve, tokens too.

    One token in five hundred may differ, and one in four from a CDF of float32 sums, where ids of small weight change
    places.
    """
    tokens, log_probs = (x.to(given.logits.device) for x in drawn)
    other = 0
    for row, u, token, log_prob in zip(given.logits, given.u, tokens, log_probs, strict=True):
        exact = row.double().log_softmax(-1)
        assert (exact[token] - log_prob).abs().max() < 1e-4, f"{method} has other log-probabilities than float64"
        other += (cdf(Problem(row[None], u[None]), torch.float64)[0] != token).sum().item()
    most = tokens.numel() / (500 if method.startswith("pyquiet") else 4)
    assert method in ("race", "multinomial") or other <= most, f"{method} draws {other} other tokens than float64"
