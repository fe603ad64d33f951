"""Gains of a short text with everything in it that is hard to show."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pyquiet
from pyquiet.evaluation import TokenGains

TEXT = "He said: \"A & B\" <b>'x'</b>\n\tÜber … 10 €\r\n\x00done"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level tokenizer."""
    return pyquiet.load("tiny-causal")[1]


@pytest.fixture(scope="session")
def gains(tokenizer: Any) -> TokenGains:
    """Made up numbers for `TEXT`, in two rows."""
    token = torch.tensor(tokenizer(TEXT, add_special_tokens=False).input_ids)
    n, generator = len(token), torch.Generator().manual_seed(0)
    row = (torch.arange(n) > 10).long()
    thought = torch.tensor(tokenizer('<i> & "', add_special_tokens=False).input_ids)
    base, mixed, entropy = torch.rand(3, n, generator=generator) * 3
    mixed[3] = base[3] + 0.001
    weight = torch.randn(n, 2, generator=generator)
    return TokenGains(row, torch.arange(n), token, base, mixed, entropy, thought.expand(n, 2, -1), weight)
