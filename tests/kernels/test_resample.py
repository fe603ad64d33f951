"""The pick of survivors by weight: its law, the bounds of its counts, effective sample sizes, and bad arguments."""

import math

import pytest
import torch

from pyquiet.kernels import ess, resample
from pyquiet.kernels.importance_resampling import SCHEMES
from pyquiet.randomness import Purpose, Stream, uniforms

from ..chi_square import chi_square

ROWS, SEED = 20_000, 31
WEIGHTS = torch.tensor([0.5, 0.0, 0.07, 0.28, 0.15])
LOG = WEIGHTS.log()


def counts(resampled, k=5):
    return torch.nn.functional.one_hot(resampled.indices, k).sum(-2).double()


def many(scheme, survivors, log_weights=LOG):
    return resample(log_weights.expand(ROWS, -1), survivors=survivors, scheme=scheme, stream=Stream(SEED))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_survivor_is_a_draw_by_weight(scheme):
    picks = many(scheme, 1).indices[:, 0]
    assert chi_square(torch.bincount(picks, minlength=5), WEIGHTS.double()) > 1e-4
    assert chi_square(torch.bincount(picks, minlength=5), torch.tensor([0.45, 0.0, 0.1, 0.29, 0.16])) < 1e-4
    assert torch.equal(picks, many("systematic", 1).indices[:, 0])  # and the same one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_survivor_is_the_first_above_its_uniform(dtype):
    u = uniforms(Stream(SEED, Purpose.RESAMPLE, position=9), 500)
    picks = resample(LOG.to(dtype).expand(500, -1), stream=Stream(SEED, position=9)).indices
    total = 0.0
    for i, w in enumerate(LOG.to(dtype).double().exp().tolist()):
        here = (u >= total) & (u < total + w)
        assert (picks[here & ((u - total).abs() > 1e-6) & ((u - total - w).abs() > 1e-6)] == i).all()
        total += w


@pytest.mark.parametrize("survivors", [2, 3, 7, 40])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_counts_are_unbiased_and_bounded(scheme, survivors):
    found, expected = counts(many(scheme, survivors)), survivors * WEIGHTS.double()
    assert (found.sum(-1) == survivors).all()
    assert (found[:, 1] == 0).all()
    error = found.std(0) / ROWS**0.5
    assert ((found.mean(0) - expected).abs() <= 4 * error + 1e-6).all()
    off = (found - expected).abs().amax()
    if scheme == "systematic":
        assert off < 1 + 1e-6
    elif scheme == "stratified":
        assert off < 2 + 1e-6
    elif scheme == "residual":
        assert (found >= (expected - 1e-6).floor()).all()
    else:
        assert off > 1.5  # what the others are spared
        assert chi_square(torch.bincount(found[:, 0].long(), minlength=survivors + 1), binomial(survivors, 0.5)) > 1e-4


def binomial(n, p):
    return torch.tensor([math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)], dtype=torch.float64)


def test_the_schemes_differ_in_spread():
    variance = {scheme: counts(many(scheme, 7)).var(0).sum() for scheme in SCHEMES}
    assert variance["multinomial"] > variance["stratified"] > variance["systematic"]
    assert variance["multinomial"] > variance["residual"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_indices_ascend_and_a_row_does_not_depend_on_the_others(scheme):
    g = torch.Generator().manual_seed(0)
    lw = 3 * torch.randn(4, 3, 9, generator=g)
    ids = torch.randperm(1000, generator=g)[:12]
    whole = resample(lw, survivors=5, scheme=scheme, stream=Stream(SEED, sequence=ids, step=2))
    assert whole.indices.shape == (4, 3, 5)
    assert (whole.indices.diff(dim=-1) >= 0).all()
    for r in range(12):
        stream = Stream(SEED, Purpose.RESAMPLE, int(ids[r]), step=2)
        alone = resample(lw.flatten(0, 1)[r] + 100, survivors=5, scheme=scheme, stream=stream)
        assert torch.equal(alone.indices, whole.indices.flatten(0, 1)[r])
        torch.testing.assert_close(alone.ess, whole.ess.flatten()[r], rtol=1e-4, atol=0)
        torch.testing.assert_close(alone.log_normalizer - 100, whole.log_normalizer.flatten()[r], rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_draws_take_the_uniforms_of_their_own_indices(scheme):
    """All but systematic draw survivor i by index + i, so the first row of each is known."""
    u = uniforms(Stream(SEED, Purpose.RESAMPLE, 0, index=4 + torch.arange(6)), 6)
    points = {
        "systematic": (torch.arange(6) + u[0]) / 6,
        "stratified": (torch.arange(6) + u) / 6,
        "multinomial": u.sort().values,
        "residual": u.sort().values,  # for equal weights of more candidates than survivors, all is drawn
    }[scheme]
    found = resample(torch.zeros(50), survivors=6, scheme=scheme, stream=Stream(SEED, sequence=0, index=4))
    assert torch.equal(found.indices, (points * 50).floor().long())


def test_effective_sample_sizes_and_mean_weights():
    none = -math.inf
    lw = torch.tensor(
        [[0.0] * 4, [0.0, none, none, none], [math.log(3.0), 0.0, none, none], [-800.0] * 4], dtype=torch.float64
    )
    for shift in (0.0, 500.0):
        done = resample(lw + shift, stream=Stream(0))
        expected = torch.tensor([4.0, 1.0, 16 / 10, 4.0], dtype=torch.float64)
        torch.testing.assert_close(done.ess, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(ess(lw + shift), expected, rtol=1e-9, atol=0)
        mean = torch.tensor([0.0, -math.log(4), 0.0, -800.0], dtype=torch.float64) + shift
        torch.testing.assert_close(done.log_normalizer, mean, rtol=1e-12, atol=1e-12)
    assert resample(lw.float(), stream=Stream(0)).ess.dtype == torch.float32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_where_no_weight_is_left_the_pick_is_uniform(scheme):
    none = torch.full((5,), -math.inf)
    done = many(scheme, 1, none)
    assert chi_square(torch.bincount(done.indices[:, 0], minlength=5), torch.full((5,), 0.2)) > 1e-4
    assert (done.ess == 5).all()
    assert (done.log_normalizer == -math.inf).all()
    assert ess(none) == 5


def test_a_weight_that_leaves_nothing_to_the_others():
    lw = torch.tensor([-1000.0, 0.0, -1000.0])
    for scheme in SCHEMES:
        assert (many(scheme, 3, lw).indices == 1).all()


def test_one_candidate():
    for scheme in SCHEMES:
        done = resample(torch.tensor([[-3.0]]), survivors=2, scheme=scheme, stream=Stream(0))
        assert done.indices.tolist() == [[0, 0]]
        assert done.ess.tolist() == [1.0]
        assert done.log_normalizer.tolist() == [-3.0]


def test_no_rows():
    assert resample(torch.empty(0, 3), survivors=2, stream=Stream(0)).indices.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_weights": [0.0]}, TypeError, "log_weights must be a float32 or float64 tensor, got list"),
        ({"log_weights": torch.zeros(3).half()}, TypeError, r"got torch.float16; convert it with .float\(\)"),
        ({"log_weights": torch.tensor(0.0)}, ValueError, r"log_weights must be \[..., k\] with k >= 1, got shape \[\]"),
        ({"log_weights": torch.zeros(2, 0)}, ValueError, r"k >= 1, got shape \[2, 0\]"),
        ({"log_weights": torch.tensor([[0.0], [math.nan]])}, ValueError, "log_weights: row 1 of 2 holds nan"),
        ({"log_weights": torch.tensor([[0.0, math.inf]])}, ValueError, "log_weights: row 0 of 1 holds inf"),
        ({"survivors": 0}, ValueError, "survivors must be at least 1, got 0"),
        ({"survivors": 1.5}, TypeError, "survivors must be an int"),
        ({"scheme": "best"}, ValueError, "scheme must be one of .*got 'best'"),
        ({"stream": Stream(0, sequence=torch.arange(3))}, ValueError, "stream.sequence must have shape"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        resample(**({"log_weights": torch.zeros(2, 4), "stream": Stream(0)} | change))
