"""Do the draws of a sampler follow the law that they should? Pearson's test and total variation, by counting.

For laws so small that all completions can be enumerated. Letters: M samples, G drawn tokens a sample, N positions, K
cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyquiet.checks import check_count, check_number
from pyquiet.testing.enumerable import enumerate_law

_LEAST_EXPECTED = 5.0  # cells of a smaller expected count are pooled: chi-square is an approximation for large counts


@dataclass(frozen=True)
class Exactness:
    """How well counts agree with a law; `str()` of it is one line to read.

    Attributes:
        chi2, dof, p_value: Pearson's statistic, its degrees of freedom, and the probability of a statistic as large
            or larger if the law is right. A sample outside of the law's support makes them inf and 0.
        tv: total variation, half the sum of |share - probability|, of the counts from the law; in [0, 1].
        floor: the mean of `tv` over direct draws of as many samples from the law itself.
        samples: M.
        cells: cells of the statistic, after pooling those of an expected count below 5.
        outside: samples to which the law gives probability zero.
    """

    chi2: float
    dof: int
    p_value: float
    tv: float
    floor: float
    samples: int
    cells: int
    outside: int

    def __str__(self) -> str:
        line = (
            f"p = {self.p_value:.3g} (chi-square {self.chi2:.1f}, {self.dof} degrees of freedom); "
            f"total variation {self.tv:.4f}, of direct draws {self.floor:.4f}; {self.samples} samples"
        )
        return line + f", {self.outside} of them outside of the law's support" * bool(self.outside)


def exactness_test(
    sampler: Callable[[int, int], Tensor],
    law: Any,
    *,
    samples: int = 20_000,
    seed: int = 0,
    input_ids: Tensor | None = None,
    known: Tensor | None = None,
) -> Exactness:
    """Tests the draws of a sampler against the law of all completions (arXiv 2504.20456, theorem 2, as a test).

    Args:
        sampler: `sampler(samples, seed)` returns that many independent samples: integer tokens [M, G] of the positions
            to fill, in ascending order of positions, or whole texts [M, N] where `input_ids` and `known` are given.
        law: log-probabilities of all completions, one axis a position (all of [V, ..., V], G axes, for one vocabulary);
            or a model that `pyquiet.any_subset.as_engine` takes, whose law is enumerated by `enumerate_law` (call that
            yourself for the law at a temperature, of top-k, top-p, banned ids or another order).
        samples: M; `samples_needed` says how many a deviation takes to be seen.
        seed: passed on to the sampler.
        input_ids, known: int64 [N] and bool [N], the text and where it is given (True). Needed for a model and for
            samples that are whole texts, in which the given tokens must be what they are in input_ids.

    Returns:
        The result. Keep the seed fixed and ask for `p_value > 1e-4`, say: the test then never fails by chance.

    Raises:
        TypeError: the law or the samples are of a wrong type.
        ValueError: the law does not sum to 1 within 1e-5, or shapes do not fit. Tokens outside of the law's support
            are no error but the result p_value = 0.

    >>> law = torch.tensor([[0.1, 0.2], [0.3, 0.4]]).log()
    >>> def draw_two_bits(samples, seed):
    ...     cells = law.exp().flatten().multinomial(samples, True, generator=torch.Generator().manual_seed(seed))
    ...     return torch.stack([cells // 2, cells % 2], 1)
    >>> exactness_test(draw_two_bits, law, samples=1000).p_value > 1e-4
    True
    """
    if not callable(sampler):
        raise TypeError(f"sampler must be a function of (samples, seed), got {type(sampler).__name__}")
    check_count("samples", samples, least=1)
    if (input_ids is None) != (known is None):
        raise ValueError("input_ids and known go together: give both, or neither")
    if not isinstance(law, Tensor):
        if input_ids is None or known is None:
            raise ValueError("law is a model: say of which text, by input_ids [N] and known [N]")
        law = enumerate_law(law, input_ids, known=known)
    probabilities = _probabilities(law)
    drawn, intact = _completions(sampler(samples, seed), samples, law.dim(), input_ids, known)
    sizes = torch.tensor(law.shape)
    inside = intact & ((drawn >= 0) & (drawn < sizes)).all(1)
    strides = sizes.flip(0).cumprod(0).flip(0) // sizes
    K = law.numel()
    cells = (drawn * strides).sum(1).where(inside, K)
    counts = torch.bincount(cells, minlength=K + 1)
    return goodness_of_fit(counts, torch.cat([probabilities, probabilities.new_zeros(1)]))


def goodness_of_fit(counts: Tensor, probabilities: Tensor) -> Exactness:
    """Tests counts [K] of independent draws against the probabilities [K] that they should have.

    >>> goodness_of_fit(torch.tensor([480, 520]), torch.tensor([0.5, 0.5])).chi2
    1.6
    """
    counts, probabilities = counts.double(), probabilities.double()
    samples = counts.sum()
    if counts.shape != probabilities.shape or counts.dim() != 1 or not (counts >= 0).all() or samples < 1:
        raise ValueError(f"counts must be [K] = {list(probabilities.shape)}, none negative and not all 0, got {counts}")
    if not (probabilities >= 0).all() or abs(float(probabilities.sum()) - 1) > 1e-5:
        raise ValueError(
            f"probabilities must be at least 0 and sum to 1, got a sum of {float(probabilities.sum()):.8g}"
        )
    outside = int(counts[probabilities == 0].sum())
    expected, place = (probabilities * samples)[probabilities > 0].sort()
    observed = counts[probabilities > 0][place]
    small = int((expected < _LEAST_EXPECTED).sum())
    if small and expected[:small].sum() < _LEAST_EXPECTED:
        small = min(small + 1, len(expected))  # too few even together: the next cell joins them
    if small:
        expected, observed = (torch.cat([x[:small].sum()[None], x[small:]]) for x in (expected, observed))
    chi2, dof = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    possible = int((probabilities > 0).sum())
    if dof == 0 and possible > 1:
        raise ValueError(
            f"samples: {int(samples)} are too few for {possible} cells, of which none would be expected twice "
            f"{_LEAST_EXPECTED:g} times; take {samples_needed(possible, 0.1)} or more"
        )
    p_value = torch.special.gammaincc(torch.tensor(dof / 2).double(), chi2 / 2) if dof else torch.ones(())
    return Exactness(
        chi2=math.inf if outside else float(chi2),
        dof=dof,
        p_value=0.0 if outside else float(p_value),
        tv=float((counts / samples - probabilities).abs().sum() / 2),
        floor=_floor(probabilities, samples),
        samples=int(samples),
        cells=len(expected),
        outside=outside,
    )


def samples_needed(cells: int, tv: float, *, p_value: float = 1e-4, power: float = 0.95) -> int:
    """How many samples make the test reject, at `p_value` and with probability `power`, a law that is off by `tv`.

    Of all laws at a total variation tv, the least visible one has the noncentrality 4 M tv^2. The statistic of K cells
    then has mean K - 1 + 4 M tv^2 and variance 2 (K - 1) + 16 M tv^2, and is taken as normal.

    >>> samples_needed(256, 0.05)
    14726
    """
    for name, value in (("cells", cells), ("tv", tv), ("p_value", p_value), ("power", power)):
        check_number(name, value)
    if not cells >= 2 or not 0 < tv <= 1 or not 0 < p_value < power < 1:
        raise ValueError(
            f"needed: cells >= 2, 0 < tv <= 1, 0 < p_value < power < 1; got {cells}, {tv}, {p_value}, {power}"
        )
    dof = cells - 1
    z, b = torch.special.ndtri(torch.tensor([1 - p_value, power]).double()).tolist()
    spread = 2 / (9 * dof)
    a = dof * ((1 - spread + z * math.sqrt(spread)) ** 3 - 1)  # the threshold above its mean (Wilson, Hilferty 1931)
    # The root x of x - a = b sqrt(2 dof + 4 x): the mean stands b deviations above the threshold.
    noncentrality: float = a + 2 * b * b + b * math.sqrt(4 * a + 4 * b * b + 2 * dof)
    return math.ceil(noncentrality / (4 * tv * tv))


def _floor(probabilities: Tensor, samples: Tensor) -> float:
    """The mean total variation of direct draws: half the mean deviations of binomial shares (De Moivre's closed form).

    Where counts are large it is sum sqrt(2 p (1 - p) / (pi M)) / 2.
    """
    p = probabilities
    v = (samples * p).floor() + 1
    log_binomial = torch.lgamma(samples + 1) - torch.lgamma(v) - torch.lgamma(samples - v + 1)
    log_deviation = log_binomial + torch.xlogy(v, p) + torch.xlogy(samples - v + 1, 1 - p)
    return float(log_deviation.exp().sum() / samples)


def _probabilities(law: Tensor) -> Tensor:
    """The probabilities, float64 [K], of log-probabilities of any shape."""
    if not law.is_floating_point() or law.dim() == 0:
        raise TypeError(f"law must hold log-probabilities, one axis a position, got {law.dtype} {list(law.shape)}")
    probabilities = law.detach().cpu().double().exp().flatten()
    total = float(probabilities.sum())
    if not abs(total - 1) <= 1e-5:
        raise ValueError(f"law must be log-probabilities whose exponentials sum to 1, got a sum of {total:.8g}")
    return probabilities


def _completions(
    drawn: Tensor, samples: int, G: int, input_ids: Tensor | None, known: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The drawn tokens at the positions to fill, int64 [M, G], and whether the given ones are intact, bool [M]."""
    if not isinstance(drawn, Tensor) or drawn.is_floating_point() or drawn.is_complex():
        raise TypeError(f"sampler must return integer tokens, got {getattr(drawn, 'dtype', type(drawn).__name__)}")
    drawn = drawn.detach().cpu().long()
    intact = torch.ones(samples, dtype=torch.bool)
    if input_ids is not None and known is not None and drawn.shape[1:] == known.shape:
        given = known.cpu()
        if (~given).sum() != G:
            raise ValueError(f"known leaves {int((~given).sum())} positions to fill, but law has {G} axes")
        if len(drawn) == samples:
            intact = (drawn == input_ids.cpu())[:, given].all(1)
        drawn = drawn[:, ~given]
    if drawn.shape != (samples, G):
        whole = "" if known is None else f" or [{samples}, {len(known)}]"
        raise ValueError(f"sampler must return tokens [{samples}, {G}]{whole}, got {list(drawn.shape)}")
    return drawn, intact
