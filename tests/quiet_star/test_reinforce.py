"""REINFORCE is unbiased: its exact expectation over all thoughts is the gradient of the expected reward.

Of a vocabulary of eight and thoughts of at most two tokens, every thought and every set of N of them is enumerated.
"""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from pyquiet import QuietStarObjective
from pyquiet.quiet_star.objective import combine
from pyquiet.quiet_star.thinking import Text
from pyquiet.quiet_star.training import grade_thoughts

from .thinkers import thinker

V, T, A = 8, 4, 2
IDS = torch.tensor([[3, 1, 4, 2]])


@functools.cache
def enumerated(m, official, temperature):
    """(parameters, log-probabilities [C, all, m] of all thoughts with gradients, their rewards [C, all])."""
    model = thinker("gpt2", m=m, vocab_size=V, official=official)
    thoughts = torch.tensor(list(itertools.product(range(V), repeat=m)))
    tokens = thoughts.expand(1, T - 1, -1, -1)
    objective = QuietStarObjective(lookahead=A, thoughts_per_token=len(thoughts), policy_temperature=temperature)
    graded = grade_thoughts(model, IDS, Text.of(IDS, None), tokens, objective)
    result = combine(objective, graded, IDS, None, tokens=tokens, drawn_log_probs=torch.zeros(tokens.shape))
    return list(model.parameters()), graded.thoughts[0], result.rewards[0]


def gradient(loss, parameters):
    parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, parts, strict=True)]
    )


def exact_gradient(m, official=False):
    """Of minus the expected reward of a thought, its rewards taken as constants."""
    parameters, log_probs, rewards = enumerated(m, official, 1.0)
    law = log_probs.sum(-1).exp()
    torch.testing.assert_close(law.sum(-1), torch.ones_like(law[:, 0]), rtol=0, atol=1e-12)
    return gradient(-(law * rewards).sum(-1)[: T - A].mean(), parameters)


def expected_gradient(objective, m, official=False):
    """Of the policy term, in expectation over N independent thoughts at every position."""
    _, drawn, _ = enumerated(m, official, 1.0)
    parameters, log_probs, rewards = enumerated(m, official, objective.policy_temperature)
    sets = torch.tensor(list(itertools.product(range(V**m), repeat=objective.thoughts_per_token)))
    chance = drawn.detach().sum(-1).exp()[:, sets].prod(-1)  # [C, sets]
    losses = objective.policy_losses(rewards[:, sets], log_probs[:, sets]).mean(-1)
    return gradient((chance * losses).sum(-1)[: T - A].mean(), parameters)


def off(actual, expected):
    """The largest difference in units of the largest element."""
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(("m", "thoughts"), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)])
def test_unbiased(m, thoughts):
    exact = exact_gradient(m)
    assert exact.abs().max() > 1e-2
    assert off(expected_gradient(QuietStarObjective(thoughts_per_token=thoughts, lookahead=A), m), exact) < 1e-10


def test_unbiased_with_tokens_that_are_never_drawn():
    """START and END have rows in an official vocabulary, but no share in the law of the thoughts."""
    objective = QuietStarObjective(thoughts_per_token=2, lookahead=A)
    assert off(expected_gradient(objective, 1, official=True), exact_gradient(1, official=True)) < 1e-10


@pytest.mark.parametrize(("m", "thoughts"), [(1, 2), (1, 3), (2, 2)])
def test_a_mean_that_includes_the_thought_shrinks_the_gradient(m, thoughts):
    objective = QuietStarObjective(thoughts_per_token=thoughts, lookahead=A, baseline="mean")
    assert off(expected_gradient(objective, m), exact_gradient(m) * (thoughts - 1) / thoughts) < 1e-10


def test_a_mean_over_steps_divides_the_gradient_by_their_number():
    objective = QuietStarObjective(thoughts_per_token=2, lookahead=A, over_steps="mean")
    assert off(expected_gradient(objective, 2), exact_gradient(2) / 2) < 1e-10


def test_a_baseline_makes_up_for_the_temperature_of_a_single_step():
    """The shift p_1 - p_3 cancels between thoughts of one law; what is left is a third of the gradient."""
    objective = QuietStarObjective(thoughts_per_token=2, lookahead=A, policy_temperature=3.0)
    assert off(expected_gradient(objective, 1), exact_gradient(1) / 3) < 1e-10


@pytest.mark.parametrize(
    ("m", "options"),
    [
        (1, {"thoughts_per_token": 2, "relu": True}),
        (1, {"thoughts_per_token": 1, "policy_temperature": 3.0}),
        (2, {"thoughts_per_token": 2, "policy_temperature": 3.0}),
        (2, {"thoughts_per_token": 2, "official": True}),
    ],
    ids=str,
)
def test_what_biases_the_gradient(m, options):
    """Neither the released relu nor its temperature gives any multiple of the gradient."""
    biased = expected_gradient(QuietStarObjective(lookahead=A, **options), m)
    exact = exact_gradient(m)
    multiple = (biased @ exact) / (exact @ exact)
    assert off(biased, multiple * exact) > 0.05


def test_a_constant_reward_sharpens_the_policy_at_temperature_3():
    """E[grad log p_3] under p_1 is (p_1 - p_3) / 3 on the logits: not zero, as that of log p_1 is."""
    for temperature, biased in ((1.0, False), (3.0, True)):
        logits = torch.randn(V, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        law = logits.detach().softmax(-1)
        objective = QuietStarObjective(thoughts_per_token=1, policy_temperature=temperature)
        losses = objective.policy_losses(torch.ones(V, 1), (logits / temperature).log_softmax(-1)[:, None, None])
        (slope,) = torch.autograd.grad((law * losses[:, 0]).sum(), logits)
        expected = -(law - (logits.detach() / temperature).softmax(-1)) / temperature
        torch.testing.assert_close(slope, expected, rtol=0, atol=1e-15)
        assert bool(slope.abs().max() > 1e-2) == biased
