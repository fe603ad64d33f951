"""The partition function of a residual model, Z = E[exp(-E)] over the denoiser's draws, from n of them."""

import math
from typing import Literal

import torch
from torch import Tensor

from pyquiet.checks import check_word

Side = Literal["lower", "jackknife", "upper"]


def log_z(log_weights: Tensor, kind: Side = "jackknife") -> Tensor:
    """An estimate of log Z = log E[w] from n draws' log-weights [..., n], float64 [...].

    With T_n the log of the mean weight, and T_{n-1} its average over leaving out one draw each:

    - "lower": T_n, which is too small on average for every n, by Jensen's inequality.
    - "jackknife": n T_n - (n - 1) T_{n-1}; the bias of order 1 / n is gone.
    - "upper": (2n - 1) T_n - 2 (n - 1) T_{n-1}, too large on average for n large enough (arXiv 2410.21357). Not below:
      where single draws have most of the weight, it is no bound.

    exp(T_n) is an estimate of Z without bias. Where all weights are 0, every kind is -inf; where all but one are, the
    last two are inf, for nothing bounds log Z then.

    Raises:
        ValueError: the kind is unknown, n is too small for it, or a weight is NaN or infinite.
        TypeError: log_weights is no floating point tensor.
    """
    if not isinstance(log_weights, Tensor) or not log_weights.is_floating_point():
        raise TypeError("log_weights must be a floating point tensor [..., n], one number a draw")
    check_word("kind", kind, Side)
    n, least = log_weights.shape[-1] if log_weights.ndim else 0, 1 if kind == "lower" else 2
    if n < least:
        raise ValueError(f"log_weights must hold at least {least} draws for kind={kind!r}, got {n}")
    log_weights = log_weights.double()
    wrong = log_weights.isnan() | (log_weights == torch.inf)
    if wrong.any():
        raise ValueError(f"log_weights hold {float(log_weights[wrong][0])}; a weight must be finite, or 0 (-inf)")
    t = log_weights.logsumexp(-1) - math.log(n)
    if kind == "lower":
        return t
    # Sums from both sides: a difference would lose what is left beside one draw of nearly all the weight.
    before, after = (_shifted(x.logcumsumexp(-1)) for x in (log_weights, log_weights.flip(-1)))
    without = torch.logaddexp(before, after.flip(-1)).mean(-1) - math.log(n - 1)
    gap = torch.where(t == -torch.inf, 0.0, t - without)
    return t + (1 if kind == "jackknife" else 2) * (n - 1) * gap


def _shifted(sums: Tensor) -> Tensor:
    return torch.nn.functional.pad(sums[..., :-1], (1, 0), value=-torch.inf)
