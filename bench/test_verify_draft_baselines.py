"""The baselines of draft verification decide as float64 does, on a small problem."""

import pytest
import torch

from .verify_draft_baselines import Problem, cdf, check, multinomial, ours, race


@pytest.mark.parametrize("method", [ours, lambda given: ours(given, given.lse), multinomial, race, cdf])
def test_baselines_agree(method) -> None:
    given = Problem.make(16, 3, 101, torch.float32, "cpu")
    tokens = method(given)
    check(given, tokens, method.__name__)
    assert (tokens[:, -1] < 0).any()
    assert (tokens[:, -1] >= 0).any()
