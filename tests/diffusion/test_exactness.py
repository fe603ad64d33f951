"""Draws of `diffuse` against the enumerated law of the same steps, candidates and options; and of laws by theory.

The enumeration takes the k candidates into account, so the tests are exact for any k. Seeds are fixed; everything here
puts the mask token into the midst of the vocabulary.
"""

import itertools

import pytest
import torch

from pyquiet.diffusion.hooks import by_confidence, by_threshold, left_to_right_blocks
from pyquiet.diffusion.sampling import diffuse
from pyquiet.diffusion.schedule import Schedule
from pyquiet.testing import enumerate_diffusion, exactness_test, resampled_law

from .networks import MASK as NETWORK_MASK
from .networks import PairEnergy, network
from .toys import PROPOSAL, SOURCE, ExactMarginals, LawEnergy, Product, kl, spread, tv

MASK = 1
EMPTY = torch.full((3,), MASK)
LAW = spread(SOURCE, MASK)
MARGINALS, PRODUCT, ENERGY = ExactMarginals(SOURCE), Product(), LawEnergy(SOURCE)
SAMPLES = 20_000


def sampler(denoiser, energy=None, *, input_ids=EMPTY, **options):
    """The sampler that fills a text many times in one batch."""

    def draw(samples, seed):
        return diffuse(denoiser, energy, input_ids=input_ids.expand(samples, -1), seed=seed, **options).tokens

    return draw


def check(law, draw, input_ids=EMPTY, samples=SAMPLES):
    result = exactness_test(draw, law, samples=samples, input_ids=input_ids, known=input_ids != MASK)
    assert result.p_value > 1e-4, result
    assert result.cells >= 3
    return result


def rejected(law, draw, input_ids=EMPTY, samples=SAMPLES):
    result = exactness_test(draw, law, samples=samples, input_ids=input_ids, known=input_ids != MASK)
    assert result.p_value < 1e-12, result


# What theory says of the laws, by enumeration alone.


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 64, None])
@pytest.mark.parametrize("denoiser", [MARGINALS, PRODUCT], ids=["marginals", "product"])
def test_a_posterior_as_residual_model_gives_its_joint_law_for_any_number_of_steps(denoiser, steps):
    law = enumerate_diffusion(denoiser, ENERGY, input_ids=EMPTY, steps=steps).exp()
    assert kl(LAW, law) < 1e-9


def test_plain_diffusion_tends_to_the_source_with_the_steps_and_carry_over_away_from_it():
    plain, carried = (
        [
            kl(LAW, enumerate_diffusion(MARGINALS, energy, input_ids=EMPTY, steps=K).exp())
            for K in (1, 2, 4, 8, 64, None)
        ]
        for energy in (None, LawEnergy(SOURCE, carry_over=True))
    )
    assert plain == sorted(plain, reverse=True)
    assert plain == pytest.approx([0.51, 0.21, 0.084, 0.035, 0.0024, 0], rel=0.03, abs=1e-9)
    assert carried == sorted(carried)
    assert carried[:5] == pytest.approx([0, 0.09, 0.15, 0.18, 0.21], abs=0.006)


def test_total_variation_of_finite_candidates():
    laws = {
        (k, K): enumerate_diffusion(MARGINALS, ENERGY, input_ids=EMPTY, steps=K, candidates=k).exp()
        for k in (4, 32)
        for K in (1, 8)
    }
    off = {key: tv(LAW, law) for key, law in laws.items()}
    assert [off[4, 1], off[4, 8]] == pytest.approx([0.1218, 0.0294], abs=1e-4)
    assert [off[32, 1], off[32, 8]] == pytest.approx([0.0134, 0.0054], abs=1e-4)


def test_a_pick_converges_as_one_over_k():
    mu, p = torch.einsum("a,b,c->abc", *PROPOSAL).view(1, -1), SOURCE.view(1, -1)
    assert float((p * p / mu).sum() - 1) == pytest.approx(11.9, abs=0.05)
    ks = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    laws = [resampled_law(mu.log(), (p / mu).log(), k) for k in ks]
    off = [tv(p, law) for law in laws]
    assert off == pytest.approx([0.56, 0.48, 0.37, 0.25, 0.16, 0.11, 0.073, 0.043, 0.023], abs=0.006)
    assert tv(p, resampled_law(mu.log(), (p / mu).log(), 8192)) * 8192 == pytest.approx(
        tv(p, resampled_law(mu.log(), (p / mu).log(), 4096)) * 4096, rel=0.02
    )
    assert all((law <= k * mu + 1e-12).all() for k, law in zip(ks, laws, strict=True))


# Draws of the sampler.

CASES = {
    "plain, one step": {"energy": None, "steps": 1},
    "plain, four steps": {"energy": None, "steps": 4},
    "plain, cosine": {"energy": None, "steps": 2, "schedule": Schedule("cosine")},
    "plain, temperature": {"energy": None, "steps": 2, "temperature": 0.5},
    "one candidate": {"candidates": 1, "steps": 2},
    "two candidates": {"candidates": 2, "steps": 1},
    "four candidates": {"candidates": 4, "steps": 1},
    "four candidates, three steps": {"candidates": 4, "steps": 3},
    "four candidates, cosine, eps": {"candidates": 4, "steps": 3, "schedule": Schedule("cosine_squared", 0.05)},
    "thirty-two candidates, eight steps": {"candidates": 32, "steps": 8},
    "carry-over": {"energy": LawEnergy(SOURCE, carry_over=True), "candidates": 4, "steps": 4},
    "window": {"candidates": 4, "steps": 4, "window": 0.5},
    "first step alone": {"candidates": 8, "steps": 3, "window": 0.0},
    "tau above 1": {"candidates": 4, "steps": 2, "energy_temperature": 3.0},
    "tau below 1": {"candidates": 4, "steps": 2, "energy_temperature": 0.3},
    "temperature": {"candidates": 4, "steps": 2, "temperature": 1.7},
    "temperature, and tau": {"candidates": 8, "steps": 1, "temperature": 0.5, "energy_temperature": 3.0},
    "top-p": {"candidates": 4, "steps": 2, "top_p": 0.8},
    "top-k": {"candidates": 4, "steps": 1, "top_k": 2, "temperature": 0.8},
    "banned": {"candidates": 4, "steps": 2, "banned": torch.tensor([False, False, True, False])},
    "banned ids are out of log mu": {
        "energy": lambda candidates, input_ids, time, log_mu: 3 * log_mu.sin(),
        "candidates": 4,
        "steps": 1,
        "banned": torch.tensor([False, False, True, False]),
    },
    "not corrected": {"candidates": 4, "steps": 2, "temperature": 0.5, "correct": False},
    "reveal set": {"candidates": 4, "steps": 2, "mode": "reveal_set"},
    "reveal set, window": {"candidates": 3, "steps": 3, "mode": "reveal_set", "top_p": 0.8, "window": 0.5},
    "other schemes": {"candidates": 3, "steps": 2, "scheme": "residual"},
    "small batches of the energy": {"candidates": 3, "steps": 2, "energy_microbatch": 9999},
}
SAME_LAW = ("scheme", "energy_microbatch")


def enumerated(denoiser, energy, options, input_ids=EMPTY):
    options = {k: v for k, v in options.items() if k not in SAME_LAW}
    return enumerate_diffusion(denoiser, energy, input_ids=input_ids, **options)


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_enumerated_law(case):
    options = {"energy": ENERGY, **CASES[case]}
    energy = options.pop("energy")
    denoiser = PRODUCT if case in ("two candidates", "banned") or "reveal set" in case else MARGINALS
    check(enumerated(denoiser, energy, options), sampler(denoiser, energy, **options))


def test_so_do_draws_from_half_precision():
    denoiser, ids = network(), torch.tensor([4, NETWORK_MASK, NETWORK_MASK, 9])
    denoiser.model.bfloat16()
    options = {"candidates": 4, "steps": 2, "temperature": 0.8}
    law = enumerated(denoiser, PairEnergy(), options, ids)
    draw = sampler(denoiser, PairEnergy(), input_ids=ids, **options)
    result = exactness_test(draw, law, samples=SAMPLES, input_ids=ids, known=ids != NETWORK_MASK)
    assert result.p_value > 1e-4, result
    assert result.cells > 100


@pytest.mark.parametrize("name", ["ancestral", "cached", "first_hitting", "semi_autoregressive"])
@pytest.mark.parametrize("energy", [None, ENERGY], ids=["plain", "energy"])
def test_every_sampler_has_the_enumerated_law(name, energy):
    options = {"candidates": 4, "steps": None if name == "first_hitting" else 3}
    law = enumerated(MARGINALS, energy, options)
    extra = {"steps": 3, "sampler": name} | ({"context": 3} if name == "semi_autoregressive" else {})
    check(law, sampler(MARGINALS, energy, **options | extra))


@pytest.mark.parametrize(
    "order", [left_to_right_blocks(1), by_confidence(1), by_threshold(1.0)], ids=["left", "sure", "threshold"]
)
def test_any_order_of_single_positions_is_exact_with_the_exact_denoiser(order):
    """The chain rule, in an order that may look at what is known; with an energy for more than one at a time too."""
    check(LAW.log(), sampler(MARGINALS, order=order))


def test_two_positions_at_a_time_are_exact_with_the_energy_alone():
    rejected(LAW.log(), sampler(MARGINALS, order=by_confidence(2)))
    check(LAW.log(), sampler(MARGINALS, ENERGY, order=by_confidence(2), candidates=256), samples=4000)


@pytest.mark.parametrize("mask_id", [0, 3])
def test_the_mask_token_may_stand_anywhere(mask_id):
    denoiser, energy = ExactMarginals(SOURCE, mask_id), LawEnergy(SOURCE, mask_id)
    empty = torch.full((3,), mask_id)
    law = enumerate_diffusion(denoiser, energy, input_ids=empty, steps=2, candidates=4)
    result = exactness_test(sampler(denoiser, energy, input_ids=empty, steps=2, candidates=4), law, samples=SAMPLES)
    assert result.p_value > 1e-4, result


def test_many_candidates_draw_from_the_source_itself():
    """By theory alone, without the enumeration of candidates."""
    check(LAW.log(), sampler(MARGINALS, ENERGY, steps=3, candidates=256), samples=4000)
    rejected(LAW.log(), sampler(MARGINALS, steps=3), samples=4000)


@pytest.mark.parametrize("k", [2, 8, 32])
def test_no_text_is_drawn_more_than_k_times_as_often_as_by_the_denoiser(k):
    draws = sampler(PRODUCT, ENERGY, steps=1, candidates=k)(SAMPLES, 0)
    counts = torch.bincount((draws * torch.tensor([16, 4, 1])).sum(1), minlength=64).double()
    bound = k * enumerate_diffusion(PRODUCT, input_ids=EMPTY, steps=1).exp().flatten()
    expected = (SAMPLES * bound).clamp(max=SAMPLES)
    assert (counts <= expected + 4 * (expected * (1 - bound).clamp(min=0)).sqrt() + 1e-9).all()
    assert (counts > 0.5 * expected)[bound > 0].any()  # the bound is nearly reached: the test can fail


# Prompts, infilling, ragged batches.

PROMPTS = {
    "right": torch.tensor([MASK, MASK, 3]),
    "both sides": torch.tensor([3, MASK, 0]),
    "middle": torch.tensor([MASK, 0, MASK]),
    "left": torch.tensor([3, MASK, MASK]),
}


def posterior(input_ids):
    known = tuple(slice(None) if x == MASK else int(x) for x in input_ids)
    return (LAW[known] / LAW[known].sum()).log()


@pytest.mark.parametrize("where", PROMPTS)
def test_infilling_draws_from_the_posterior_given_both_sides(where):
    ids = PROMPTS[where]
    law = enumerate_diffusion(MARGINALS, ENERGY, input_ids=ids, steps=2)
    torch.testing.assert_close(law.exp(), posterior(ids).exp(), rtol=0, atol=1e-6)
    check(posterior(ids), sampler(MARGINALS, ENERGY, input_ids=ids, steps=2, candidates=256), ids, samples=4000)
    law = enumerate_diffusion(PRODUCT, ENERGY, input_ids=ids, steps=3, candidates=3)
    check(law, sampler(PRODUCT, ENERGY, input_ids=ids, steps=3, candidates=3), ids)


def test_carry_over_does_not_look_to_the_right():
    carried = LawEnergy(SOURCE, carry_over=True)
    ids = PROMPTS["right"]
    rejected(posterior(ids), sampler(MARGINALS, carried, input_ids=ids, steps=1, candidates=256), ids, samples=4000)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["schedule_first", "cached", "first_hitting"])
def test_a_ragged_batch_of_texts(side, name):
    """Texts of other lengths and prompts in one batch, in turn; each has the law that it has alone."""
    texts = [EMPTY, PROMPTS["middle"], torch.tensor([MASK, MASK]), torch.tensor([MASK]), torch.tensor([3, MASK])]
    share = SAMPLES // 4
    ids, attended = torch.zeros(len(texts), 3, dtype=torch.long), torch.zeros(len(texts), 3)
    for row, text in enumerate(texts):
        part = slice(0, len(text)) if side == "right" else slice(3 - len(text), 3)
        ids[row, part], attended[row, part] = text, 1
    out = diffuse(
        MARGINALS,
        ENERGY,
        input_ids=ids.repeat(share, 1),
        attention_mask=attended.repeat(share, 1),
        steps=2,
        candidates=3,
        sampler=name,
    ).tokens.view(share, len(texts), 3)
    for row, text in enumerate(texts):
        part = slice(0, len(text)) if side == "right" else slice(3 - len(text), 3)
        steps = None if name == "first_hitting" else 2
        law = enumerate_diffusion(MARGINALS, ENERGY, input_ids=text, steps=steps, candidates=3)
        result = exactness_test(
            lambda samples, seed, row=row, part=part: out[:, row, part],
            law,
            samples=share,
            input_ids=text,
            known=text != MASK,
        )
        assert result.p_value > 1e-4, (row, result)


# The set of steps and tokens, jointly; modes and corrections.


def marginal(*positions):
    """The law of these positions, with axes of size 1 for the others."""
    others = [i for i in range(3) if i not in positions]
    return LAW.sum(others, keepdim=True) if others else LAW


def joint_of_steps_and_tokens(steps):
    """Log-probabilities [K, K, K, V, V, V] of when each position opens and what it becomes, for plain diffusion."""
    law = torch.zeros(*[steps] * 3, *LAW.shape, dtype=torch.float64)
    for when in itertools.product(range(steps), repeat=3):
        p, known = torch.full_like(LAW, steps**-3), []
        for step in sorted(set(when)):
            opened = [i for i in range(3) if when[i] == step]
            for i in opened:
                p = p * (marginal(*known, i) / marginal(*known)).nan_to_num(0.0)
            known += opened
        law[when] = p
    return law.log()


@pytest.mark.parametrize("name", ["schedule_first", "ancestral", "cached"])
def test_when_and_what_have_the_joint_law(name):
    law = joint_of_steps_and_tokens(3)

    def draw(samples, seed):
        out = diffuse(MARGINALS, input_ids=EMPTY.expand(samples, -1), steps=3, sampler=name, seed=seed)
        return torch.cat([out.reveal_step, out.tokens], 1)

    result = exactness_test(draw, law, samples=30_000)
    assert result.p_value > 1e-4, result
    assert result.cells > 300
    rejected_by_its_order = exactness_test(lambda n, seed: draw(n, seed)[:, [1, 2, 0, 3, 4, 5]], law, samples=30_000)
    assert rejected_by_its_order.p_value < 1e-12


def test_candidates_that_differ_where_a_step_opens_alone_have_another_law():
    options = {"candidates": 16, "steps": 4}
    rejected(enumerated(PRODUCT, ENERGY, options), sampler(PRODUCT, ENERGY, mode="reveal_set", **options))


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"temperature": 2.0}, {"top_p": 0.9999}], ids=str)
def test_a_processed_proposal_is_corrected(options):
    law = enumerated(PRODUCT, ENERGY, {"steps": 2} | options)
    assert tv(LAW, law.exp()) < 0.002
    check(LAW.log(), sampler(MARGINALS, ENERGY, steps=2, candidates=512, **options), samples=3000)


def test_tau_aims_between_the_source_and_the_denoiser():
    """p^(1 / tau) mu^(1 - 1 / tau), normalised; of a step."""
    mu = torch.einsum("a,b,c->abc", *PROPOSAL)
    for tau in (0.5, 2.0):
        target = SOURCE ** (1 / tau) * mu ** (1 - 1 / tau)
        target = spread(target / target.sum(), MASK)
        law = enumerate_diffusion(PRODUCT, ENERGY, input_ids=EMPTY, steps=1, energy_temperature=tau).exp()
        torch.testing.assert_close(law, target, rtol=0, atol=1e-6)
    check(target.log(), sampler(PRODUCT, ENERGY, steps=1, candidates=512, energy_temperature=2.0), samples=3000)


def test_an_energy_that_depends_on_time_gets_the_time_at_which_the_step_begins():
    def energy(candidates, input_ids, time, log_mu):
        return 6 * (time[:, None] - 0.5) * (candidates == 0).sum(-1)

    options = {"steps": 4, "candidates": 4, "schedule": Schedule("cosine")}
    check(enumerated(MARGINALS, energy, options), sampler(MARGINALS, energy, **options))
    seen = []

    def listening(candidates, input_ids, time, log_mu):
        assert time.dtype == torch.float64
        seen.extend(time.unique().tolist())
        return torch.zeros(candidates.shape[:2])

    diffuse(MARGINALS, listening, input_ids=EMPTY.expand(200, -1), steps=4, schedule=Schedule("cosine"))
    assert seen == [1.0, 0.75, 0.5, 0.25]


def test_the_estimate_of_z_is_unbiased_and_ess_is_its_own():
    """Of one step with a product proposal: Z = 1, with a known variance; ess against the weights themselves."""
    out = diffuse(PRODUCT, ENERGY, input_ids=EMPTY.expand(SAMPLES, -1), steps=1, candidates=8)
    z = out.log_normalizer.exp()
    chi2 = float((SOURCE**2 / torch.einsum("a,b,c->abc", *PROPOSAL)).sum() - 1)
    assert abs(float(z.mean()) - 1) < 4 * (chi2 / 8 / SAMPLES) ** 0.5
    assert float(z.var()) == pytest.approx(chi2 / 8, rel=0.15)
    assert ((out.ess >= 1) & (out.ess <= 8)).all()
    even = diffuse(PRODUCT, lambda c, x, t, m: torch.full(m.shape, 3.0), input_ids=EMPTY[None], steps=1, candidates=8)
    assert float(even.ess) == pytest.approx(8)
    assert float(even.log_normalizer) == pytest.approx(-3)
    for prompt in PROMPTS.values():
        observed = float(LAW[tuple(slice(None) if x == MASK else int(x) for x in prompt)].sum())
        out = diffuse(MARGINALS, ENERGY, input_ids=prompt.expand(4000, -1), steps=1, candidates=8)
        z = out.log_normalizer.exp()
        assert abs(float(z.mean()) - observed) < 4 * float(z.std()) / 4000**0.5 + 1e-6
