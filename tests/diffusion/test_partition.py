"""Estimates of log Z: on which side of it they are, and by how much."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pyquiet.diffusion.partition import log_z

from .toys import PROPOSAL, SOURCE

MU = torch.einsum("a,b,c->abc", *PROPOSAL).flatten()
LOG_WEIGHTS = (SOURCE.flatten() / MU).log()  # chi-square of 11.9 between the two; Z = 1
DRAWS = 1 << 20


@pytest.fixture(scope="module")
def draws() -> torch.Tensor:
    """float64 [2^20], in the order in which estimates take them."""
    u = torch.rand(DRAWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return LOG_WEIGHTS[torch.searchsorted(MU.cumsum(0), u).clamp(max=26)]


def bias(draws: torch.Tensor, n: int, kind: str) -> tuple[float, float]:
    found = log_z(draws.view(-1, n), kind)
    return float(found.mean()), float(found.std()) / len(found) ** 0.5


def test_the_source_is_the_one_of_the_figures():
    assert float((MU * (LOG_WEIGHTS.exp() - 1) ** 2).sum()) == pytest.approx(11.9, abs=0.05)


def test_lower_rises_to_log_z_from_below(draws):
    found = [bias(draws, n, "lower") for n in (1, 2, 4, 8, 32, 256)]
    for (mean, error), expected in zip(found, (-1.59, -0.86, -0.51, -0.32, -0.12, -0.02), strict=True):
        assert mean == pytest.approx(expected, abs=0.006 + 4 * error)
        assert mean < -4 * error
    for (mean, error), (next_mean, next_error) in itertools.pairwise(found):
        assert next_mean - mean > 4 * math.hypot(error, next_error)


def test_one_draw_of_the_lower_kind_is_exact():
    assert float((MU * log_z(LOG_WEIGHTS[:, None], "lower")).sum()) == pytest.approx(float(MU @ LOG_WEIGHTS))


def test_upper_is_above_from_four_draws_on(draws):
    for n, expected in ((4, 0.16), (8, 0.10), (32, 0.06)):
        mean, error = bias(draws, n, "upper")
        assert mean > 4 * error
        assert mean == pytest.approx(expected, abs=0.006 + 4 * error)


def test_the_jackknife_has_less_bias(draws):
    for n, expected in ((2, -0.12), (4, -0.18), (8, -0.11), (32, -0.03)):
        mean, error = bias(draws, n, "jackknife")
        assert mean == pytest.approx(expected, abs=0.006 + 4 * error)
        assert abs(mean) + 4 * error < abs(bias(draws, n, "lower")[0])


def test_its_exponential_is_unbiased(draws):
    """Of all pairs of draws, by enumeration; and the jackknife's is not."""
    pairs = torch.cartesian_prod(torch.arange(27), torch.arange(27))
    weights, probabilities = LOG_WEIGHTS[pairs], MU[pairs].prod(1)
    assert float(probabilities @ log_z(weights, "lower").exp()) == pytest.approx(1, abs=1e-12)
    assert abs(float(probabilities @ log_z(weights, "jackknife").exp()) - 1) > 0.1


def test_it_is_the_definition_along_the_last_dimension():
    weights = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for row, found in zip(
        weights.flatten(0, 1),
        zip(*(log_z(weights, kind).flatten() for kind in ("lower", "jackknife", "upper")), strict=True),
        strict=True,
    ):
        t = row.exp().mean().log()
        without = torch.stack([torch.cat([row[:j], row[j + 1 :]]).exp().mean().log() for j in range(5)]).mean()
        torch.testing.assert_close(torch.stack(found), torch.stack([t, 5 * t - 4 * without, 9 * t - 8 * without]))
    assert log_z(weights.float()).dtype == torch.float64


def test_what_is_left_beside_one_heavy_draw_is_not_lost():
    """log(S - w_j) would be -inf where a draw has all but 1e-30 of the weight."""
    weights = torch.tensor([0.0, -70.0, -71.0], dtype=torch.float64)
    without = (2 * math.log(0.5) + math.log((math.exp(-70) + math.exp(-71)) / 2)) / 3
    expected = 3 * -math.log(3) - 2 * without
    assert float(log_z(weights)) == pytest.approx(expected, rel=1e-12)
    assert float(log_z(weights + 1e4)) == pytest.approx(expected + 1e4, rel=1e-12)


def test_impossible_draws():
    gone = torch.full((4,), -torch.inf)
    assert [float(log_z(gone, kind)) for kind in ("lower", "jackknife", "upper")] == [-math.inf] * 3
    gone[2] = 1.0
    assert float(log_z(gone, "lower")) == pytest.approx(1 - math.log(4))
    assert [float(log_z(gone, kind)) for kind in ("jackknife", "upper")] == [math.inf] * 2


def test_bad_arguments_are_named():
    weights = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="kind must be one of lower, jackknife, upper, got 'exact'"):
        log_z(weights, "exact")
    with pytest.raises(ValueError, match="at least 2 draws for kind='jackknife', got 1"):
        log_z(weights[:, :1])
    with pytest.raises(ValueError, match="at least 1 draws for kind='lower', got 0"):
        log_z(weights[:, :0], "lower")
    with pytest.raises(TypeError, match="floating point"):
        log_z(weights.long())
    for wrong in (math.nan, math.inf):
        weights[1, 2] = wrong
        with pytest.raises(ValueError, match=f"log_weights hold {wrong}"):
            log_z(weights)
