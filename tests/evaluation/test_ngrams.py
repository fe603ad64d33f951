"""n-grams against counts by hand, brute-force jackknife, a law that is known, and negative controls."""

import math
from collections import Counter

import pytest
import torch

from pyquiet.evaluation import NGramModel, distinct_ngrams, ngram_variation

CHAIN = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)


def walks(count, length, seed, chain=CHAIN):
    """Texts of the Markov chain, int64 [count, length], the first symbols being 0."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.zeros(count, dtype=torch.int64)
    steps = [states]
    for _ in range(length - 1):
        states = torch.multinomial(chain[states], 1, generator=generator)[:, 0]
        steps.append(states)
    return torch.stack(steps, 1)


def brute_force(samples, reference, n):
    def law(texts):
        counts = Counter(tuple(t[i : i + n]) for t in texts for i in range(len(t) - n + 1))
        return {gram: count / counts.total() for gram, count in counts.items()}

    p, q = law(samples), law(reference)
    return sum(abs(p.get(gram, 0) - q.get(gram, 0)) for gram in {*p, *q}) / 2


@pytest.mark.parametrize("n", [1, 2, 3])
def test_total_variation_and_its_jackknife(n):
    samples, reference = ["abcab", "bb", "cabdd", "a"], ["abcabcab", "bca", "xyz"]
    found = ngram_variation(samples, reference, n)
    assert found.mean == pytest.approx(brute_force(samples, reference, n), abs=1e-12)
    without = torch.tensor(
        [brute_force(samples[:i] + samples[i + 1 :], reference, n) for i in range(4)], dtype=torch.float64
    )
    error = math.sqrt(3 / 4 * float((without - without.mean()).square().sum()))
    assert found.error == pytest.approx(error, abs=1e-12)


def test_variation_of_equal_of_disjoint_and_of_single_texts():
    assert ngram_variation(["abab", "ab"], ["abab", "ab"], 2).mean == pytest.approx(0, abs=1e-12)
    assert ngram_variation(["aa"], ["bb"], 1).mean == 1
    assert math.isnan(ngram_variation(["aa"], ["bb"], 1).error)
    ids = [torch.tensor([1, 2, 3]), torch.tensor([3, 3])]
    assert ngram_variation(ids, [[1, 2], [3]], 1).mean == pytest.approx(
        brute_force([[1, 2, 3], [3, 3]], [[1, 2], [3]], 1)
    )


def test_the_right_law_is_at_its_sampling_floor_and_a_wrong_one_above():
    reference, samples, floor = walks(2000, 50, 0), walks(200, 50, 1), walks(200, 50, 2)
    other = walks(200, 50, 3, chain=(CHAIN + 0.1) / 1.3)
    right, least, wrong = (ngram_variation(x, reference, 2) for x in (samples, floor, other))
    error = math.hypot(right.error, least.error)
    assert abs(right.mean - least.mean) < 4 * error
    assert wrong.mean - least.mean > 4 * error
    shuffled = samples.gather(1, torch.rand(samples.shape, generator=torch.Generator().manual_seed(0)).argsort(1))
    assert ngram_variation(shuffled, reference, 1).mean == pytest.approx(ngram_variation(samples, reference, 1).mean)
    assert ngram_variation(shuffled, reference, 2).mean - least.mean > 4 * error


def test_the_model_is_add_constant_smoothing():
    model = NGramModel(["abab", "ac"], 2, add=0.5)  # a, b, c and one for all others: S = 4
    first = {"a": 3, "b": 2, "c": 1}
    assert model.symbols == 4
    for symbol, count in first.items():
        assert model.nll([symbol]).item() == pytest.approx(-math.log((count + 0.5) / (6 + 2)))
    expected = -math.log(3.5 / 8) - math.log((2 + 0.5) / (3 + 2)) - math.log(0.5 / (1 + 2)) - math.log(0.5 / (0 + 2))
    assert model.nll(["abxy"]).item() == pytest.approx(expected / 4)
    mass = sum(math.exp(-2 * model.nll(["a" + w]).item()) for w in "abc?") / math.exp(-model.nll(["a"]).item())
    assert mass == pytest.approx(1)
    assert model.nll(["", "a"]).isnan().tolist() == [True, False]
    assert torch.equal(NGramModel([[0, 1, 0, 1], [0, 2]], 2, add=0.5).nll([[0, 1]]), model.nll(["ab"]))


def test_the_nll_of_a_chain_is_its_entropy_and_that_of_others_is_higher():
    model = NGramModel(walks(2000, 50, 0), 2, add=0.02)
    stationary = torch.linalg.matrix_power(CHAIN, 100)[0]
    entropy = -(stationary[:, None] * CHAIN * CHAIN.log()).sum()
    nll = model.nll(walks(200, 400, 1))
    assert abs(nll.mean() - entropy) < 4 * nll.std() / math.sqrt(200)
    unigram = NGramModel(walks(2000, 50, 0), 1).nll(walks(200, 400, 1))
    assert unigram.mean() - nll.mean() > 20 * nll.std() / math.sqrt(200)
    uniform = model.nll(torch.randint(3, (200, 400), generator=torch.Generator().manual_seed(0)))
    assert uniform.mean() - entropy > 20 * nll.std() / math.sqrt(200)


def test_distinct():
    found = distinct_ngrams(["aaaa", "abcd", "abab", "a"], 2)
    assert found[:3].tolist() == pytest.approx([1 / 3, 1, 2 / 3])
    assert found[3].isnan()
    assert distinct_ngrams(torch.tensor([[1, 1, 2], [1, 2, 3]]), 1).tolist() == pytest.approx([2 / 3, 1])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ngram_variation(["a", "b"], ["abc"], 2), "samples"),
        (lambda: ngram_variation(["abc"], ["a"], 2), "reference"),
        (lambda: ngram_variation(["abc"], ["abc"], 0), "n must be at least 1"),
        (lambda: distinct_ngrams(["abc"], 0), "n must be at least 1"),
        (lambda: NGramModel(["abc"], 0), "n must be at least 1"),
        (lambda: NGramModel(["abc"], 2, add=0.0), "add must be above 0"),
        (lambda: NGramModel([""], 2), "reference holds no text"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
