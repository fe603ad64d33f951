"""The noise schedule of masked diffusion: how much of a text is still clean at a time (arXiv 2406.07524).

Time runs from 1, where all is masked, to 0, the clean text. Training, sampling and likelihood all take the same object.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyquiet.checks import check_count, check_number, check_word

_HALF_PI = math.pi / 2
_LEAST, _MOST = 1e-4, 20.0  # of the noise level sigma of the geometric schedule
_SPAN = math.exp(-_LEAST) - math.exp(-_MOST)


class _Kind(NamedTuple):
    """The clean share a(t) from 1 to 0, 1 - a(t) without cancellation, -a'(t), and the time of a clean share."""

    clean: Callable[[Tensor], Tensor]
    masked: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    time: Callable[[Tensor], Tensor]


def _sigma(t: Tensor) -> Tensor:
    return _LEAST ** (1 - t) * _MOST**t


_KINDS = {
    "linear": _Kind(lambda t: 1 - t, lambda t: t, torch.ones_like, lambda a: 1 - a),
    "cosine": _Kind(
        lambda t: (_HALF_PI * (1 - t)).sin(),
        lambda t: 2 * (_HALF_PI / 2 * t).sin() ** 2,
        lambda t: _HALF_PI * (_HALF_PI * t).sin(),
        lambda a: 1 - a.asin() / _HALF_PI,
    ),
    "cosine_squared": _Kind(
        lambda t: (_HALF_PI * (1 - t)).sin() ** 2,
        lambda t: (_HALF_PI * t).sin() ** 2,
        lambda t: _HALF_PI * (2 * _HALF_PI * t).sin(),
        lambda a: 1 - a.sqrt().asin() / _HALF_PI,
    ),
    "geometric": _Kind(
        lambda t: (torch.exp(-_sigma(t)) - math.exp(-_MOST)) / _SPAN,
        lambda t: -math.exp(-_LEAST) * torch.expm1(_LEAST - _sigma(t)) / _SPAN,
        lambda t: torch.exp(-_sigma(t)) * _sigma(t) * math.log(_MOST / _LEAST) / _SPAN,
        lambda a: torch.log(-torch.log(a * _SPAN + math.exp(-_MOST)) / _LEAST) / math.log(_MOST / _LEAST),
    ),
}
KINDS = tuple(_KINDS)


@dataclass(frozen=True)
class Schedule:
    """alpha(t), the probability that a token is still clean at time t: 1 at t = 0, and `eps` at t = 1.

    Args:
        kind: "linear", alpha = 1 - t; "cosine", cos(pi t / 2); "cosine_squared", its square; "geometric", exp(-sigma)
            with sigma from 1e-4 to 20 in equal ratios, stretched to reach 1 and 0.
        eps: in [0, 1): the share that noise spares at time 1. "linear" with 1e-3 is what MDLM calls log-linear.

    All methods take and give tensors of any shape, computed in float64.

    Raises:
        ValueError, TypeError: the kind is unknown, or eps out of range or no number.
    """

    kind: str = "linear"
    eps: float = 0.0

    def __post_init__(self) -> None:
        check_word("kind", self.kind, KINDS)
        if not 0 <= check_number("eps", self.eps) < 1:
            raise ValueError(f"eps must be in [0, 1), got {self.eps}")

    def alpha(self, t: Tensor) -> Tensor:
        """The probability that a token is clean at time t."""
        return self.eps + (1 - self.eps) * _KINDS[self.kind].clean(t.double())

    def weight(self, t: Tensor) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)), how the NELBO weighs the masked tokens of time t: 1 / t for "linear"."""
        kind, t = _KINDS[self.kind], t.double()
        return kind.slope(t) / kind.masked(t)

    def time(self, alpha: Tensor) -> Tensor:
        """The time at which a token is clean with probability alpha in [eps, 1]."""
        return _KINDS[self.kind].time(((alpha.double() - self.eps) / (1 - self.eps)).clamp(0, 1))

    def reveal(self, t: Tensor, s: Tensor) -> Tensor:
        """The probability that a token masked at time t is revealed by the earlier time s <= t, t > 0."""
        masked = _KINDS[self.kind].masked
        return 1 - masked(s.double()) / masked(t.double())  # whatever eps is; exactly 1 at s = 0

    def grid(self, steps: int) -> Tensor:
        """The times of a sampler of so many steps, evenly spaced from 1 to exactly 0: float64 [steps + 1]."""
        return torch.linspace(1, 0, check_count("steps", steps, least=1) + 1, dtype=torch.float64)
