"""A Quiet-STaR training step: thoughts drawn after every token, the released loss, its gradient for all weights.

`model.thinking_loss` in official mode against the loop of the release (`released_training.py`), as it is and in its
best form. Before they are timed, all must compute the same loss with the same thoughts. Beside the time of a step stand
the peak of the process and what the forward pass keeps for the backward pass.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.functional import pad

from pyquiet import QuietStarObjective

from .machine import Machine
from .memory import peak_mib, saved_mib
from .models import random_thinker
from .released_training import released_loss
from .timing import watched

MODEL = "llama-1m"
THOUGHT_TOKENS, LOOKAHEAD, THOUGHTS = 9, 4, 2  # n_ahead = 12
OBJECTIVE = QuietStarObjective(official=True, thoughts_per_token=THOUGHTS, lookahead=LOOKAHEAD)
TABLE = f"training step, {MODEL}, m = {THOUGHT_TOKENS}, A = {LOOKAHEAD}, N = {THOUGHTS}, one text"
METHODS = ("pyquiet", "pyquiet checkpointed", "release", "release, trimmed")
# How many times faster than the release a step is meant to be, with AVX-512 and with AVX2.
GOALS = {256: (2.5, 2), 512: (4, 3), 1024: (5, 4)}
ROUNDS = {256: 8, 512: 5, 1024: 3}  # a step of the release takes seconds
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def thinker() -> Any:
    return random_thinker(MODEL, thought_tokens=THOUGHT_TOKENS, official=True)


def text(length: int) -> Tensor:
    """Return random token ids [1, length]."""
    return torch.randint(3, 2048, (1, length), generator=torch.Generator().manual_seed(0))


def loss_function(method: str, model: Any, ids: Tensor) -> Callable[..., Any]:
    """Return the method's forward pass; it draws its own thoughts unless given `tokens` [B, T, N, m]."""
    if method.startswith("pyquiet"):
        return lambda: model.thinking_loss(ids, objective=OBJECTIVE, seed=0)
    trimmed = method.endswith("trimmed")
    return lambda tokens=None: released_loss(
        model, ids, thoughts=THOUGHTS, lookahead=LOOKAHEAD, tokens=tokens, trimmed=trimmed
    )


def check_same_loss(ours: Any, theirs: Callable[..., Any]) -> None:
    """The loss of the release, given our thoughts, is ours, term by term."""
    with torch.no_grad():
        expected = theirs(tokens=pad(ours.tokens, (0, 0, 0, 0, 0, 1)))  # none of ours follows the last token
    for term in ("base_nll", "mixed_nll", "policy", "loss"):
        torch.testing.assert_close(getattr(expected, term), getattr(ours, term).detach(), rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", GOALS, ids="T{}".format)
def test_training_step(benchmark: BenchmarkFixture, machine: Machine, thinker: Any, length: int, method: str) -> None:
    ids = text(length)
    forward = loss_function(method, thinker, ids)
    if method.startswith("release"):
        check_same_loss(loss_function("pyquiet", thinker, ids)(), forward)
    checkpointed = method == "pyquiet checkpointed"
    if checkpointed:
        thinker.gradient_checkpointing_enable({"use_reentrant": False})
    thinker.train(checkpointed)  # evaluated, nothing is checkpointed; there is no dropout

    def step() -> None:
        thinker.zero_grad()
        forward().loss.backward()

    try:
        with watched(benchmark):
            benchmark.pedantic(step, rounds=ROUNDS[length], warmup_rounds=1)
        seconds = benchmark.stats.stats.min
        peak, saved = peak_mib(step), saved_mib(forward, thinker.parameters())
    finally:
        thinker.gradient_checkpointing_disable()
        thinker.eval().zero_grad()
    benchmark.extra_info.update(
        table=TABLE, shape=f"T{length}", method=method, seconds=seconds, peak_mib=peak, saved_mib=saved
    )
    if method == "pyquiet":
        benchmark.extra_info["goal"] = GOALS[length][machine.isa == "avx2"]
