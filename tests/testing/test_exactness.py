"""The exactness test itself: it accepts direct draws, rejects deviations when it says it can, and names bad input."""

import math

import numpy as np
import pytest
import torch

from pyquiet.testing import TabularEngine, enumerate_law, exactness_test, goodness_of_fit, samples_needed

LAW = (torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)) * 2).flatten().log_softmax(0).view(3, 4, 5)


def direct(law):
    """A sampler that draws from the enumerated law itself."""

    def sample(samples, seed):
        generator = torch.Generator().manual_seed(seed)
        cells = law.double().exp().flatten().multinomial(samples, True, generator=generator)
        return torch.stack(torch.unravel_index(cells, law.shape), 1)

    return sample


def counted(law, samples, times):
    """Counts of so many direct draws from a law [K], some times: [times, K]."""
    return torch.from_numpy(np.random.default_rng(1).multinomial(samples, law / law.sum(), size=times))


def test_the_statistic_is_pearsons():
    counts, law = torch.tensor([30, 25, 45]), torch.tensor([0.2, 0.3, 0.5]).double()
    result = goodness_of_fit(counts, law)
    assert result.chi2 == pytest.approx(10**2 / 20 + 5**2 / 30 + 5**2 / 50)
    assert (result.dof, result.cells, result.samples) == (2, 3, 100)
    assert result.p_value == pytest.approx(math.exp(-result.chi2 / 2))  # the tail for two degrees of freedom
    assert result.tv == pytest.approx(0.1)


def test_cells_of_small_expected_counts_are_pooled():
    counts = torch.tensor([50, 3, 1, 40, 4, 2])
    result = goodness_of_fit(counts, torch.tensor([0.5, 0.02, 0.02, 0.39, 0.04, 0.03]))
    assert (result.cells, result.dof) == (3, 2)
    assert result.chi2 == pytest.approx(0 + 1 / 39 + (10 - 11) ** 2 / 11, rel=1e-5)
    assert result.tv == pytest.approx((1 + 1 + 1 + 0 + 0 + 1) / 200, rel=1e-5)


def test_a_pool_that_is_still_small_takes_the_next_cell():
    result = goodness_of_fit(torch.tensor([2, 10, 88]), torch.tensor([0.02, 0.08, 0.9]))
    assert result.cells == 2
    assert result.chi2 == pytest.approx(2**2 / 10 + 2**2 / 90, rel=1e-5)


def test_p_values_of_direct_draws_are_uniform():
    p = torch.tensor([exactness_test(direct(LAW), LAW, samples=2000, seed=s).p_value for s in range(400)])
    assert goodness_of_fit(torch.histc(p, 10, 0, 1), torch.full((10,), 0.1)).p_value > 1e-4


@pytest.mark.parametrize("samples", [100, 20_000])
def test_the_floor_is_the_mean_variation_of_direct_draws(samples):
    p = LAW.double().exp().flatten()
    results = [goodness_of_fit(counts, p) for counts in counted(p, samples, 200)]
    tv = torch.tensor([r.tv for r in results])
    assert abs(tv.mean() - results[0].floor) < 4 * tv.std() / 200**0.5
    if samples == 100:
        k = torch.arange(101.0).double()
        binomial = torch.distributions.Binomial(100, p[:, None]).log_prob(k).exp()
        exact = (binomial * (k / 100 - p[:, None]).abs()).sum() / 2
        assert results[0].floor == pytest.approx(float(exact), rel=1e-9)
    if samples == 20_000:
        assert results[0].floor == pytest.approx(
            float((2 * p * (1 - p) / (math.pi * samples)).sqrt().sum() / 2), rel=0.02
        )


@pytest.mark.parametrize(("cells", "tv"), [(256, 0.05), (20, 0.05), (2, 0.03)])
def test_the_promised_power_is_there(cells, tv):
    """A uniform law of which half of the cells got heavier: the deviation that is hardest to see."""
    law = torch.full((cells,), 1 / cells).double()
    off = law + torch.tensor([1.0, -1.0]).repeat(cells // 2) * 2 * tv / cells
    assert float((off - law).abs().sum() / 2) == pytest.approx(tv)

    def rejected(samples):
        return sum(goodness_of_fit(counts, law).p_value < 1e-4 for counts in counted(off, samples, 1000)) / 1000

    needed = samples_needed(cells, tv)
    assert 0.92 < rejected(needed) < 0.99
    assert rejected(needed // 4) < 0.4
    assert 0.4 < rejected(samples_needed(cells, tv, power=0.5)) < 0.6


def test_a_sample_outside_of_the_support_settles_it():
    law = LAW.clone()
    law[1] = -math.inf
    law = law - law.flatten().logsumexp(0)
    assert exactness_test(direct(law), law, samples=500).p_value > 1e-4
    tokens = direct(law)(500, 0)
    for bad in ([1, 0, 0], [3, 0, 0], [0, 4, 0], [0, 0, -1]):
        result = exactness_test(
            lambda samples, seed, bad=bad: tokens.index_put((torch.tensor(9),), torch.tensor(bad)), law, samples=500
        )
        assert (result.p_value, result.chi2, result.outside) == (0, math.inf, 1)
        assert "1 of them outside of the law's support" in str(result)
        assert result.tv >= 1 / 500


def test_a_law_of_one_completion():
    law = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf]])
    result = exactness_test(lambda samples, seed: torch.zeros(samples, 2).long(), law, samples=10)
    assert (result.chi2, result.dof, result.p_value, result.tv, result.floor) == (0, 0, 1, 0, 0)


INPUT_IDS, KNOWN = torch.tensor([2, 0, 1, 0, 0]), torch.tensor([True, False, True, False, True])


def test_a_model_is_enumerated_and_whole_texts_are_read():
    model = TabularEngine(3, 5)
    law = enumerate_law(model, INPUT_IDS, known=KNOWN)

    def texts(samples, seed):
        out = INPUT_IDS.repeat(samples, 1)
        out[:, ~KNOWN] = direct(law)(samples, seed)
        return out

    whole = exactness_test(texts, model, samples=3000, seed=4, input_ids=INPUT_IDS, known=KNOWN)
    assert whole == exactness_test(direct(law), law, samples=3000, seed=4)
    assert whole.p_value > 1e-4
    assert whole != exactness_test(direct(law), law, samples=3000, seed=5)

    def careless(samples, seed):
        out = texts(samples, seed)
        out[7, 2] = 0  # a given token
        return out

    result = exactness_test(careless, model, samples=3000, input_ids=INPUT_IDS, known=KNOWN)
    assert (result.p_value, result.outside) == (0, 1)
    swapped = exactness_test(lambda m, s: direct(law)(m, s).flip(1), law, samples=3000)
    assert swapped.p_value < 1e-6


def test_the_result_reads_as_one_line():
    assert str(goodness_of_fit(torch.tensor([30, 25, 45]), torch.tensor([0.2, 0.3, 0.5]))) == (
        "p = 0.0421 (chi-square 6.3, 2 degrees of freedom); total variation 0.1000, of direct draws 0.0540; 100 samples"
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"samples": 1e3}, TypeError, "samples must be an int, got float"),
        (
            {"sampler": torch.zeros(50, 2).long()},
            TypeError,
            r"sampler must be a function of \(samples, seed\), got Tensor",
        ),
        ({"law": LAW + 1e-4}, ValueError, "law .* sum to 1, got a sum of 1.0001"),
        ({"law": LAW * math.nan}, ValueError, "sum of nan"),
        ({"law": LAW.long()}, TypeError, "law must hold log-probabilities"),
        ({"law": TabularEngine(3, 5)}, ValueError, "law is a model: say of which text"),
        ({"known": KNOWN}, ValueError, "input_ids and known go together"),
        ({"known": KNOWN, "input_ids": INPUT_IDS}, ValueError, r"tokens \[50, 3\] or \[50, 5\], got \[50, 2\]"),
        ({"law": "model", "known": KNOWN, "input_ids": INPUT_IDS}, TypeError, "model must be"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, error, message):
    def sample(samples, seed):
        return torch.zeros(samples, 2).long()

    with pytest.raises(error, match=message):
        exactness_test(**{"sampler": sample, "law": LAW, "samples": 50, **arguments})


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(50, 3), TypeError, "integer tokens, got torch.float32"),
        ([[0, 0, 0]] * 50, TypeError, "integer tokens, got list"),
        (torch.zeros(49, 3).long(), ValueError, r"tokens \[50, 3\], got \[49, 3\]"),
        (torch.zeros(50).long(), ValueError, r"got \[50\]"),
    ],
)
def test_samples_that_do_not_fit_are_refused(tokens, error, message):
    with pytest.raises(error, match=message):
        exactness_test(lambda samples, seed: tokens, LAW, samples=50)


def test_whole_texts_with_another_number_of_gaps_are_refused():
    with pytest.raises(ValueError, match="known leaves 2 positions to fill, but law has 3 axes"):
        exactness_test(
            lambda samples, seed: torch.zeros(samples, 5).long(), LAW, samples=5, input_ids=INPUT_IDS, known=KNOWN
        )


@pytest.mark.parametrize("arguments", [(1, 0.1), (4, 0.0), (4, 1.5)])
def test_power_of_nonsense_is_refused(arguments):
    with pytest.raises(ValueError, match="cells >= 2, 0 < tv <= 1"):
        samples_needed(*arguments)
    with pytest.raises(TypeError, match="tv must be a number, got str"):
        samples_needed(4, "small")


def test_too_few_samples_to_tell_anything_are_refused():
    law = torch.full((4, 4, 4, 4), 1 / 256).log()

    def constant(samples, seed):
        return torch.zeros(samples, 4, dtype=torch.int64)

    with pytest.raises(ValueError, match="samples: 1000 are too few for 256 cells"):
        exactness_test(constant, law, samples=1000)
    assert exactness_test(constant, law, samples=2000).p_value == 0


@pytest.mark.parametrize(
    ("counts", "probabilities", "named"),
    [
        ([0, 0], [0.5, 0.5], "counts"),
        ([-5, 10], [0.5, 0.5], "counts"),
        ([1, 2, 3], [0.5, 0.5], "counts"),
        ([1, 2], [1.5, 1.5], "probabilities"),
    ],
)
def test_what_are_no_counts_or_no_law_is_named(counts, probabilities, named):
    with pytest.raises(ValueError, match=named):
        goodness_of_fit(torch.tensor(counts), torch.tensor(probabilities))
