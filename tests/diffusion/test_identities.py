"""What costs as much as a source's entropy, and what more: `nelbo` and `nll` against sums over all texts and masks.

A set of n of T tokens is masked with weight B(n, T - n + 1), the integral of t^(n - 1) (1 - t)^(T - n), whatever the
schedule. `test_likelihood.py` has the same with an energy.
"""

import itertools
import math

import pytest
import torch

from pyquiet.diffusion.likelihood import nll
from pyquiet.diffusion.schedule import Schedule
from pyquiet.diffusion.training import nelbo
from pyquiet.testing import enumerate_diffusion

from .toys import SOURCE, ExactMarginals, ids_of, spread

MASK, T = 1, 3
TEXTS = torch.cartesian_prod(*[torch.arange(3)] * T)  # [27, T], symbols
P = SOURCE.flatten()
ENTROPY = -float((P * P.log()).sum())
SETS = [s for n in range(1, T + 1) for s in itertools.combinations(range(T), n)]


def cost(text, masked):
    """-log p of each masked token, given what is observed."""
    part = SOURCE[tuple(slice(None) if i in masked else x for i, x in enumerate(text))]  # one axis a masked position
    others = [[b for b in range(len(masked)) if b != a] for a in range(len(masked))]
    alone = [part.sum(axes) if axes else part for axes in others]
    return -sum(math.log(law[text[i]] / part.sum()) for i, law in zip(masked, alone, strict=True))


@pytest.mark.parametrize("mask_id", [0, 1, 3])
def test_the_training_loss_of_the_exact_denoiser_is_the_entropy(mask_id):
    """The sum over all texts and sets; each text enters seven times, a set and its weight a time."""
    masked = torch.tensor([[i in s for i in range(T)] for s in SETS])
    weights = torch.tensor([math.factorial(len(s) - 1) * math.factorial(T - len(s)) / math.factorial(T) for s in SETS])
    total = 0.0
    for text, p in zip(ids_of(TEXTS, mask_id), P, strict=True):
        loss = nelbo(ExactMarginals(SOURCE, mask_id), text.expand(7, -1), masked=masked, weight=weights).text
        total += float(p * loss.double().sum())
    assert total == pytest.approx(ENTROPY, abs=1e-5)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("cosine")], ids=["linear", "cosine"])
def test_the_steps_of_plain_diffusion_cost_what_their_sets_do(schedule):
    """The sum over steps, sets and texts; and never less than what the sampler's own law gives the source's texts."""
    steps, total, denoiser = 3, 0.0, ExactMarginals(SOURCE, MASK)
    for t, s in itertools.pairwise(schedule.grid(steps)):
        alpha, rho = float(schedule.alpha(t)), float(schedule.reveal(t, s))
        for masked in SETS:
            chance = (1 - alpha) ** len(masked) * alpha ** (T - len(masked))
            for text, p in zip(TEXTS.tolist(), P.tolist(), strict=True):
                total += p * chance * rho * cost(text, masked)
    law = enumerate_diffusion(denoiser, input_ids=torch.full((T,), MASK), steps=steps, schedule=schedule)
    own = -float((spread(SOURCE, MASK) * law).nan_to_num(0.0).sum())
    assert ENTROPY + 0.01 < own < total - 0.01
    options = {"kind": "K_step", "samples": 7, "steps": steps, "schedule": schedule}
    found = torch.stack([P @ nll(denoiser, ids_of(TEXTS, MASK), seed=seed, **options).nats for seed in range(16)])
    error = float(found.std()) / 4
    assert error < 0.04
    assert abs(float(found.mean()) - total) < 4 * error
