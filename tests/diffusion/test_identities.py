"""What bounds the entropy of a source and what does not, by enumeration; and `nll` and `nelbo` against these sums.

Expectations over the noise are exact: a set of n of T tokens is masked with weight B(n, T - n + 1), the integral of
t^(n - 1) (1 - t)^(T - n), whatever the schedule.
"""

import itertools
import math

import pytest
import torch

from pyquiet.diffusion.likelihood import nll
from pyquiet.diffusion.schedule import Schedule
from pyquiet.diffusion.training import nelbo
from pyquiet.testing import enumerate_diffusion

from .toys import PROPOSAL, SOURCE, ExactMarginals, LawEnergy, Product, ids_of, spread

MASK = 1
TEXTS = torch.cartesian_prod(*[torch.arange(3)] * 3)  # [27, T], symbols
P = SOURCE.flatten()
ENTROPY = -float((P * P.log()).sum())
SETS = [s for n in (1, 2, 3) for s in itertools.combinations(range(3), n)]
COPIED = torch.eye(27, dtype=torch.float64) / 27  # two tokens, always equal


def weight(n: int, T: int = 3) -> float:
    return math.exp(math.lgamma(n) + math.lgamma(T - n + 1) - math.lgamma(T + 1))


def posterior(law, text, masked, marginal_of=None):
    """p(x_U | x_observed) of a law at a text, U the masked positions or some of them."""
    given = tuple(slice(None) if i in masked else int(x) for i, x in enumerate(text))
    part = law[given] / law[given].sum()  # one axis a masked position
    axes = [masked.index(i) for i in (marginal_of or masked)]
    part = part.sum([a for a in range(part.dim()) if a not in axes]) if len(axes) < part.dim() else part
    return float(part[tuple(int(text[i]) for i in (marginal_of or masked))])


def carried(law, text, masked):
    """The law over the masked positions, [S, ...], of scoring these alone from left to right."""
    T, S = law.dim(), law.shape[0]
    table = torch.zeros([S] * len(masked), dtype=torch.float64)
    for words in itertools.product(range(S), repeat=len(masked)):
        whole = [int(x) for x in text]
        for i, w in zip(masked, words, strict=True):
            whole[i] = w
        p = 1.0
        for i in masked:
            prefix = law.sum(list(range(i + 1, T))) if i + 1 < T else law
            before = prefix.sum(-1)
            p *= float(prefix[tuple(whole[: i + 1])] / before[tuple(whole[:i])])
        table[words] = p
    return table


def expectation(law, cost):
    """sum over texts and sets of p(text) weight(set) cost(text, set)."""
    texts = itertools.product(*[range(n) for n in law.shape])
    sets = [s for n in range(1, law.dim() + 1) for s in itertools.combinations(range(law.dim()), n)]
    return sum(
        float(law[text]) * weight(len(s), law.dim()) * cost(text, s) for text in texts if law[text] > 0 for s in sets
    )


def joint_cost(law):
    return lambda text, s: -math.log(posterior(law, text, s))


def marginal_cost(law):
    return lambda text, s: -sum(math.log(posterior(law, text, s, [i])) for i in s)


def carried_joint_cost(law):
    return lambda text, s: -math.log(carried(law, text, s)[tuple(text[i] for i in s)])


def carried_marginal_cost(law):
    def cost(text, s):
        table = carried(law, text, s)
        others = [[b for b in range(len(s)) if b != a] for a in range(len(s))]
        alone = [table.sum(o) if o else table for o in others]
        return -sum(math.log(alone[a][text[i]]) for a, i in enumerate(s))

    return cost


def test_the_exact_marginals_cost_the_entropy():
    assert abs(ENTROPY - 2.5469) < 1e-4
    assert expectation(SOURCE, marginal_cost(SOURCE)) == pytest.approx(ENTROPY, abs=1e-9)
    assert expectation(COPIED, marginal_cost(COPIED)) == pytest.approx(math.log(27), abs=1e-9)
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 2), (4, 4), (2, 2, 2, 2), (5, 5, 5)):
        law = torch.rand(shape, generator=generator, dtype=torch.float64) ** 3
        law /= law.sum()
        assert expectation(law, marginal_cost(law)) == pytest.approx(-float((law * law.log()).sum()), abs=1e-9)


def test_all_masked_positions_at_once_cost_less_than_the_entropy():
    """So the released evaluation's objective bounds nothing."""
    assert expectation(SOURCE, joint_cost(SOURCE)) == pytest.approx(2.199, abs=1e-3)
    assert expectation(COPIED, joint_cost(COPIED)) == pytest.approx(math.log(27) / 2, abs=1e-9)


def test_carry_over_at_once_costs_what_the_autoregressive_model_does():
    """Whatever it draws: its own bound is far above."""
    assert expectation(SOURCE, carried_joint_cost(SOURCE)) == pytest.approx(ENTROPY, abs=1e-9)
    assert expectation(SOURCE, carried_marginal_cost(SOURCE)) == pytest.approx(2.853, abs=1e-3)


# The package's own figures, against these.


@pytest.mark.parametrize("mask_id", [0, 1, 3])
def test_the_training_loss_of_the_exact_denoiser_is_the_entropy(mask_id):
    """The sum over all texts and sets; each text enters seven times, a set and its weight a time."""
    masked = torch.tensor([[i in s for i in range(3)] for s in SETS])
    weights = torch.tensor([weight(len(s)) for s in SETS])
    ids = ids_of(TEXTS, mask_id)
    total = 0.0
    for text, p in zip(ids, P, strict=True):
        loss = nelbo(ExactMarginals(SOURCE, mask_id), text.expand(7, -1), masked=masked, weight=weights).text
        total += float(p * loss.double().sum())
    assert total == pytest.approx(ENTROPY, abs=1e-5)


def measured(denoiser, energy, kind, *, law=SOURCE, n=64, samples=7, repeats=16, **options):
    """The mean over the source's texts and its standard error, from repeats with seeds of their own."""
    texts = torch.cartesian_prod(*[torch.arange(law.shape[0])] * law.dim())
    p = law.flatten()
    texts, p = ids_of(texts[p > 0], MASK), p[p > 0]
    means = torch.stack(
        [
            (p * nll(denoiser, texts, energy, kind=kind, n=n, samples=samples, seed=seed, **options).nats).sum()
            for seed in range(repeats)
        ]
    )
    return float(means.mean()), float(means.std()) / repeats**0.5


def assert_near(value, mean_and_error, slack=0.0):
    mean, error = mean_and_error
    assert error < 0.04  # a test that could not fail otherwise
    assert abs(mean - value) < 4 * error + slack, (mean, value, error)


EXACT, MARGINALS, PRODUCT = LawEnergy(SOURCE), ExactMarginals(SOURCE), Product()
CARRIED = LawEnergy(SOURCE, carry_over=True)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("denoiser", "slack"), [(MARGINALS, 0.005), (PRODUCT, 0.03)], ids=["marginals", "product"])
def test_the_exact_energy_costs_the_entropy_for_any_number_of_steps(denoiser, slack, steps):
    assert_near(ENTROPY, measured(denoiser, EXACT, "K_step", steps=steps, samples=4), slack)


def test_the_marginal_bound_of_the_exact_energy_is_the_entropy():
    assert_near(ENTROPY, measured(MARGINALS, EXACT, "marginal"), 0.005)
    assert_near(ENTROPY, measured(MARGINALS, None, "marginal"))
    plain = expectation(SOURCE, lambda text, s: -sum(math.log(PROPOSAL[i, text[i]]) for i in s))
    assert_near(plain, measured(PRODUCT, None, "marginal", samples=40))


@pytest.mark.filterwarnings("ignore")
def test_the_joint_figure_is_below_the_entropy_and_carry_over_is_the_identity():
    assert_near(2.199, measured(MARGINALS, EXACT, "joint_paper"), 0.005)
    assert_near(ENTROPY, measured(MARGINALS, CARRIED, "joint_paper"), 0.005)
    assert_near(2.853, measured(MARGINALS, CARRIED, "marginal"), 0.008)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("cosine")], ids=["linear", "cosine"])
def test_the_steps_of_plain_diffusion_cost_what_their_sets_do(schedule):
    """The sum over steps, sets and texts; and never less than what the sampler's own law gives the source's texts."""
    steps, total = 3, 0.0
    grid = schedule.grid(steps)
    for t, s in itertools.pairwise(grid):
        alpha, rho = float(schedule.alpha(t)), float(schedule.reveal(t, s))
        for masked in SETS:
            chance = (1 - alpha) ** len(masked) * alpha ** (3 - len(masked))
            for text, p in zip(TEXTS.tolist(), P.tolist(), strict=True):
                total += p * chance * rho * marginal_cost(SOURCE)(text, masked)
    law = enumerate_diffusion(MARGINALS, input_ids=torch.full((3,), MASK), steps=steps, schedule=schedule)
    own = -float((spread(SOURCE, MASK) * law).nan_to_num(0.0).sum())
    assert ENTROPY + 0.01 < own < total - 0.01
    assert_near(total, measured(MARGINALS, None, "K_step", steps=steps, schedule=schedule))
