"""The baselines of candidates draw as float64 does, on a small problem."""

import pytest
import torch

from .draw_candidates_baselines import Problem, cdf, check, multinomial, ours, race


@pytest.mark.parametrize(
    ("name", "method"), [("pyquiet", ours), ("cdf", cdf), ("race", race), ("multinomial", multinomial)]
)
def test_baselines_agree(name, method) -> None:
    given = Problem.make(16, 9, 101, torch.float32, "cpu")
    tokens, log_probs = method(given)
    check(given, (tokens, log_probs), name)
    with pytest.raises(AssertionError, match="log-probabilities"):
        check(given, (tokens, log_probs - 1e-3), name)
    if name in ("pyquiet", "cdf"):
        with pytest.raises(AssertionError, match="tokens"):
            check(given, cdf(Problem(given.logits, given.u.flip(-1))), name)
