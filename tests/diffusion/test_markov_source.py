"""A source of 27 symbols and its exact denoiser: how far texts of 64 are from it by steps, candidates and energy.

Bits are of the source's own -log2 p(text) a symbol, its entropy at best; more is worse. What plain parallel steps lose
is the dependence of symbols that open together, and the energy brings it back. The figures hold for bigrams of the
licences that Debian ships; of another text the order and the ratios hold.
"""

import functools
import itertools

import pytest
import torch

from pyquiet.diffusion.sampling import diffuse

from .toys import MarkovChain, MarkovDenoiser, MarkovEnergy, english, symbols_of

MASK, TEXTS = 13, 512
TRANSITION, OF_LICENCES = english()
CHAIN = MarkovChain(TRANSITION)
DENOISER, ENERGY = MarkovDenoiser(CHAIN, MASK), MarkovEnergy(CHAIN, MASK)
FIGURES = {  # bits by steps
    1: {1: 6.58, 2: 4.83, 4: 4.04, 8: 3.64, 16: 3.45, 32: 3.36},
    8: {1: 5.72, 2: 4.25, 4: 3.70, 8: 3.46, 16: 3.35, 32: 3.30},
    64: {1: 5.23, 8: 3.38},
}


@functools.cache
def filled(steps, candidates, energy=ENERGY, **options):
    empty = torch.full((TEXTS, CHAIN.length), MASK)
    return diffuse(DENOISER, energy, input_ids=empty, steps=steps, candidates=candidates, **options)


def bits(*arguments, **options):
    """The mean of 512 texts, and its standard error."""
    return CHAIN.bits(symbols_of(filled(*arguments, **options).tokens, MASK))


def worse(more, less, sigmas=4):
    return more[0] - less[0] > sigmas * (more[1] ** 2 + less[1] ** 2) ** 0.5


def test_the_denoiser_is_exact():
    """Against sums over all texts, for a small chain and every pattern of masks."""
    transition = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.3, 0.5, 0.2]], dtype=torch.float64)
    chain = MarkovChain(transition, 4)
    texts = torch.cartesian_prod(*[torch.arange(3)] * 4)
    p = chain.log_prob(texts).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(chain.start @ transition, chain.start)
    exact = -float((p * p.log2()).sum()) / 4
    assert chain.entropy() == pytest.approx(exact, abs=1e-12)
    for text in ([2, 0, 1, 2], [0, 1, 1, 0]):
        for pattern in range(1, 16):
            masked = torch.tensor([pattern >> i & 1 for i in range(4)]).bool()
            agree = ((texts == torch.tensor(text)) | masked).all(1)
            law = MarkovDenoiser(chain, 1).log_marginals(torch.tensor([text]), masked[None])[0].exp()
            for i in masked.nonzero()[:, 0]:
                expected = torch.bincount(texts[agree, i], p[agree], minlength=3)
                torch.testing.assert_close(law[i], expected / expected.sum(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("candidates", FIGURES)
def test_more_steps_are_better_and_tend_to_the_entropy(candidates):
    figures = [bits(steps, candidates) for steps in FIGURES[candidates]]
    assert all(worse(a, b, 3) for a, b in itertools.pairwise(figures))
    assert figures[-1][0] > CHAIN.entropy() - 4 * figures[-1][1]


def test_more_candidates_are_better_at_equal_steps():
    for steps in FIGURES[8]:
        assert worse(bits(steps, 1), bits(steps, 8), 3)
    for steps in FIGURES[64]:
        assert worse(bits(steps, 8), bits(steps, 64), 3)


def test_the_energy_takes_away_the_share_of_the_loss_that_the_figures_say():
    """On any text; the share grows with the steps, as fewer symbols at a time are easier to weigh."""
    for steps in (2, 4, 8):
        plain, corrected = (bits(steps, k)[0] - CHAIN.entropy() for k in (1, 8))
        ratio = (FIGURES[8][steps] - 3.267) / (FIGURES[1][steps] - 3.267)
        assert corrected / plain == pytest.approx(ratio, rel=0.2)


def test_the_other_sign_is_worse_than_no_energy():
    """The released sampler weighs by exp(+E): the defect that this must never become."""
    right, none, wrong = bits(8, 8), bits(8, 1), bits(8, 8, MarkovEnergy(CHAIN, MASK, sign=-1))
    assert worse(none, right, 6)
    assert worse(wrong, none, 6)
    if OF_LICENCES:
        assert [right[0], none[0], wrong[0]] == pytest.approx([3.460, 3.637, 3.921], abs=0.05)


@pytest.mark.skipif(not OF_LICENCES, reason="the licences under /usr/share/common-licenses are not all there")
def test_the_figures_of_the_licences():
    assert CHAIN.entropy() == pytest.approx(3.267, abs=5e-4)
    for candidates, by_steps in FIGURES.items():
        for steps, figure in by_steps.items():
            mean, error = bits(steps, candidates)
            assert mean == pytest.approx(figure, abs=4 * (error**2 + 0.012**2) ** 0.5), (candidates, steps)


def test_weights_degenerate_where_much_is_masked_and_that_is_not_hidden():
    sizes = [float(filled(steps, 8).ess.mean()) for steps in (1, 4, 8, 32)]
    assert sizes == sorted(sizes)
    assert sizes == pytest.approx([1.1, 1.5, 1.9, 2.3], abs=0.15 if OF_LICENCES else 0.4)


def test_candidates_of_the_reveal_set_alone_have_evener_weights():
    figures, usual = bits(8, 8, mode="reveal_set"), bits(8, 8)
    assert worse(usual, figures, 2)
    assert float(filled(8, 8, mode="reveal_set").ess.mean()) > float(filled(8, 8).ess.mean()) + 0.2
    if OF_LICENCES:
        assert figures[0] == pytest.approx(3.395, abs=0.05)


def test_a_window_is_between_none_and_all():
    plain, half, full = bits(8, 1), bits(8, 8, window=0.5), bits(8, 8)
    assert worse(plain, half, 2) or worse(half, full, 2)
    assert full[0] - 3 * full[1] < half[0] < plain[0] + 3 * plain[1]
    passes = filled(8, 8, window=0.5).energy_passes
    assert (passes <= 8 * 5).all()  # t = 1, 7/8, ..., 1/2
    assert (filled(8, 8).energy_passes == 8 * filled(8, 8).denoiser_calls).all()


def test_adaptive_candidates_are_drawn_until_the_weights_are_even_enough():
    out = filled(8, 4, ess_target=3.0, max_candidates=64)
    mean, error = CHAIN.bits(symbols_of(out.tokens, MASK))
    assert worse(bits(8, 4), (mean, error), 2)
    trace = out.trace
    done = (trace.ess >= 3.0 - 1e-6) | (trace.candidates >= 64)
    assert done[trace.corrected].all()
    assert trace.candidates.unique().numel() > 2  # not all texts need the same
    assert (out.energy_passes > 4 * out.denoiser_calls).any()


def test_texts_look_like_the_source():
    """By their letters and pairs of letters: total variation from the chain's own law falls with steps and energy."""
    pairs = CHAIN.start[:, None] * CHAIN.transition

    def off(out):
        symbols = symbols_of(out.tokens, MASK)
        counts = torch.bincount((symbols[:, :-1] * 27 + symbols[:, 1:]).flatten(), minlength=729)
        return float((counts / counts.sum() - pairs.flatten()).abs().sum() / 2)

    assert off(filled(2, 1)) > off(filled(8, 1)) > off(filled(8, 8)) > off(filled(32, 8))
    assert off(filled(8, 8, MarkovEnergy(CHAIN, MASK, sign=-1))) > off(filled(8, 1)) + 0.02
