"""Pearson's test of drawn tokens against the law that they should follow."""

import torch
from torch import Tensor


def chi_square(counts: Tensor, law: Tensor) -> float:
    """The p-value of Pearson's test of counts [V] against probabilities [V]."""
    expected = law.double() * counts.sum()
    cells = expected > 0
    assert counts[~cells].sum() == 0
    statistic = ((counts.double() - expected)[cells] ** 2 / expected[cells]).sum()
    freedom = torch.tensor((cells.sum().item() - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()
