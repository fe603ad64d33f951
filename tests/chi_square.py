"""Pearson's test of drawn tokens against the law that they should follow."""

from torch import Tensor

from pyquiet.testing import goodness_of_fit


def chi_square(counts: Tensor, law: Tensor) -> float:
    """The p-value of counts [V] against probabilities [V]; 0 where a token of probability zero was drawn."""
    return goodness_of_fit(counts, law).p_value
