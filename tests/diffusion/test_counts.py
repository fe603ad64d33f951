"""What noise a text draws from, and what it costs: the counts have their law (alone = in a batch: test_sampling.py)."""

import pytest
import torch

from pyquiet.diffusion.sampling import diffuse
from pyquiet.diffusion.schedule import Schedule
from pyquiet.testing import goodness_of_fit

from .toys import MarkovChain, MarkovDenoiser, MarkovEnergy, Product

MASK, S, B, T, K = 2, 5, 5, 9, 7
COUNTS = torch.tensor([[(1.0 + (3 * i + 2 * j) % 7) ** 2 for j in range(S)] for i in range(S)], dtype=torch.float64)
CHAIN = MarkovChain(COUNTS / COUNTS.sum(1, keepdim=True))
DENOISER, ENERGY = MarkovDenoiser(CHAIN, MASK), MarkovEnergy(CHAIN, MASK)
SAMPLERS = ("schedule_first", "ancestral", "cached", "first_hitting", "semi_autoregressive")


def texts():
    """Of one length with other prompts, one of them complete, one empty."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, S + 1, (B, T), generator=generator)
    hidden = torch.rand(B, T, generator=generator) < 0.6
    hidden[1], hidden[2] = True, False
    return ids.masked_fill(hidden, MASK)


def run(ids, sampler="schedule_first", **options):
    options = {"steps": 6, "candidates": K, "seed": 11} | options
    extra = {"context": 4, "stride": 2} if sampler == "semi_autoregressive" else {}
    return diffuse(DENOISER, ENERGY, input_ids=ids, sampler=sampler, **extra | options)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_prompts_never_change(sampler):
    ids = texts()
    out = run(ids, sampler=sampler, mode="reveal_set")
    given = ids != MASK
    assert torch.equal(out.tokens[given], ids[given])
    assert (out.reveal_step[given] == -1).all()
    assert (out.tokens != MASK).all()
    assert (out.reveal_step[~given] >= 0).all()
    full = (given).all(1)
    assert full.sum() == 1
    assert (out.denoiser_calls[full] == 0).all()
    assert (out.energy_passes[full] == 0).all()


def test_the_seed_and_the_id_name_the_noise():
    ids = torch.full((4, T), MASK)
    first = run(ids)
    assert torch.equal(first.tokens, run(ids).tokens)
    assert not torch.equal(first.tokens, run(ids, seed=12).tokens)
    moved = run(ids, sequence_ids=torch.tensor([2, 3, 4, 5]))
    assert torch.equal(moved.tokens[:2], first.tokens[2:])
    twins = run(ids, sequence_ids=torch.tensor([7, 7, 7, 7]))
    assert len(twins.tokens.unique(dim=0)) == 1


def test_texts_of_one_batch_are_independent():
    """The tokens of neighbours agree as often as those of strangers."""
    ids = torch.full((4000, 1), MASK)
    laws = torch.tensor([[0.3, 0.25, 0.2, 0.15, 0.1]], dtype=torch.float64)
    tokens = diffuse(Product(laws, MASK), input_ids=ids, steps=1).tokens[:, 0]
    agree = float((laws**2).sum())
    for lag in (1, 2, 7):
        share = float((tokens[lag:] == tokens[:-lag]).double().mean())
        assert abs(share - agree) < 4 * (agree * (1 - agree) / 4000) ** 0.5


def test_the_picks_of_a_text_are_independent():
    """Which of eight equal candidates is taken in two steps: all 64 pairs as often."""
    rows, k, seen = 3000, 8, []

    def indifferent(candidates, input_ids, time, log_mu):
        seen.append(candidates)
        return torch.zeros_like(log_mu)

    denoiser, ids = Product(torch.full((2, 1024), 1 / 1024).double(), 1024), torch.full((rows, 2), 1024)
    out = diffuse(denoiser, indifferent, input_ids=ids, candidates=k, sampler="first_hitting")
    picks = []
    for step, candidates in enumerate(seen):
        opened = out.reveal_step == step
        hits = candidates.transpose(1, 2)[opened] == out.tokens[opened][:, None]  # [B, k]
        assert hits.any(1).all()  # the step writes what it picked
        picks.append(hits.long().argmax(1))
    counts = torch.bincount(picks[0] * k + picks[1], minlength=k * k)
    assert goodness_of_fit(counts, torch.full((k * k,), 1 / (k * k))).p_value > 1e-4


# Counts.


def mean_and_error(x):
    return float(x.double().mean()), float(x.double().std()) / len(x) ** 0.5


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("cosine_squared")], ids=["linear", "cosine_squared"])
def test_calls_have_the_mean_of_the_formula(schedule):
    """A step opens something with 1 - (1 - q)^T, q the share of it; summed over steps. One row alone, so also of each
    row of a batch: a batch saves as much as its rows.
    """
    steps, length, rows = 16, 12, 3000
    denoiser, ids = Product(torch.full((length, 3), 1 / 3).double(), MASK), torch.full((rows, length), MASK)
    options = {"input_ids": ids, "steps": steps, "schedule": schedule}
    opens = 1 - (1 - schedule.alpha(schedule.grid(steps)).diff()) ** length
    first = diffuse(denoiser, sampler="schedule_first", **options)
    mean, error = mean_and_error(first.denoiser_calls)
    assert abs(mean - float(opens.sum())) < 3 * error
    assert error < 0.05
    cached = diffuse(denoiser, sampler="cached", **options)
    mean, error = mean_and_error(cached.denoiser_calls)
    assert abs(mean - float(1 + opens[:-1].sum())) < 3 * error  # called again after each step that opened something
    if schedule == Schedule():
        assert float(opens.sum()) == pytest.approx(steps * (1 - (1 - 1 / steps) ** length))
    assert (diffuse(denoiser, sampler="ancestral", **options).denoiser_calls == steps).all()


def test_the_published_share_of_calls():
    """1000 steps and 1024 tokens: 641 calls; and of 100 tokens, 95."""
    for length, calls in ((1024, 641.0), (100, 95.2)):
        denoiser, ids = Product(torch.full((length, 2), 0.5).double(), MASK), torch.full((8, length), MASK)
        mean, error = mean_and_error(diffuse(denoiser, input_ids=ids, steps=1000).denoiser_calls)
        assert abs(mean - calls) < 4 * error + 0.5
        assert error < 8


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_first_hitting_times_are_those_of_independent_positions(kind):
    """alpha at the events is ordered like n uniforms: the i-th of n has mean i / (n + 1), and its variance."""
    schedule, n, rows = Schedule(kind), 4, 2000
    denoiser, ids = Product(torch.full((n, 2), 0.5).double(), MASK), torch.full((rows, n), MASK)
    out = diffuse(denoiser, input_ids=ids, schedule=schedule, sampler="first_hitting")
    assert (out.reveal_step.sort(1).values == torch.arange(n)).all()
    assert abs(float(out.reveal_step.double().mean(0)[0]) - 1.5) < 4 * (1.25 / rows) ** 0.5  # no place is the first
    for i in range(n):
        here = out.trace.steps == i
        alpha = schedule.alpha(out.trace.times[here])
        mean = (i + 1) / (n + 1)
        variance = mean * (1 - mean) / (n + 2)
        assert len(alpha) == rows
        assert abs(float(alpha.mean()) - mean) < 4 * (variance / rows) ** 0.5
        assert float(alpha.var()) == pytest.approx(variance, rel=0.2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_counters_are_what_the_networks_saw(sampler):
    """Calls counted by the denoiser and the energy themselves; and that of rows of logits by the head."""
    seen = []

    class Counting(MarkovEnergy):
        def __call__(self, candidates, input_ids, time, log_mu, **kwargs):
            seen.append(candidates.shape[0] * candidates.shape[1])
            return super().__call__(candidates, input_ids, time, log_mu, **kwargs)

    denoiser, ids = MarkovDenoiser(CHAIN, MASK), texts()
    extra = {"context": 4, "stride": 2} if sampler == "semi_autoregressive" else {}
    out = diffuse(
        denoiser, Counting(CHAIN, MASK), input_ids=ids, steps=6, candidates=K, sampler=sampler, window=0.5, **extra
    )
    assert int(out.denoiser_calls.sum()) == denoiser.calls
    assert int(out.energy_passes.sum()) == sum(seen)
    assert (out.energy_passes % K == 0).all()
    assert (out.depth == out.denoiser_calls + out.energy_passes // K).all()
    if sampler == "first_hitting":
        assert torch.equal(out.denoiser_calls, (ids == MASK).sum(1))
