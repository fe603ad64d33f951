"""Filling in any order: one call of the network with a cache, and whole texts from a prompt of 5 %.

Against transformers' XLNet, which recomputes all positions in each call, and against the released procedure on it.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import pyquiet
from pyquiet.any_subset import as_engine, order_from_mask

from . import released_infilling
from .machine import Machine
from .models import random_xlnet
from .timing import best_seconds, watched

POSITIONS, PROMPT, DECIDED = 256, 200, 220
# Content rows and query rows of a call, and what it is.
CALLS = {
    "sequential 1c+1q": (1, 1),
    "draft of 5, 1c+5q": (1, 5),
    "density of 5, 5c+5q": (5, 5),
    "one call, 3 drafts, 4c+16q": (4, 16),
}
GOALS = {"xlnet-6l": 15, "xlnet-6l-bytes": 30}
LENGTH, GIVEN, DRAFTS = 512, 0.05, 5
ROUNDS = 3


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    """Seconds by method, for the ratios of later benches."""
    return {}


def problem(name: str) -> tuple[Any, Tensor, Tensor, int]:
    """A model, a text [N], its order [N] and the prompt's length."""
    generator = torch.Generator().manual_seed(0)
    model = random_xlnet(name)
    tokens = torch.randint(0, model.config.vocab_size, (POSITIONS,), generator=generator)
    known = torch.zeros(POSITIONS, dtype=torch.bool)
    known[torch.randperm(POSITIONS, generator=generator)[:PROMPT]] = True
    order, prompt = order_from_mask(known)
    return model, tokens, order, int(prompt)


@pytest.mark.parametrize("name", GOALS)
@torch.inference_mode()
def test_full_call(benchmark: BenchmarkFixture, machine: Machine, measured: dict[str, float], name: str) -> None:
    model, tokens, order, prompt = problem(name)
    ranks = torch.tensor([DECIDED])
    run = lambda: released_infilling.network(model, tokens, order, ranks, prompt, DECIDED)  # noqa: E731
    measured[name] = seconds = best_seconds(benchmark, run)
    benchmark.extra_info.update(table=table(name), method="transformers, one target", milliseconds=seconds * 1e3)


@pytest.mark.parametrize("name", GOALS)
@pytest.mark.parametrize("what", CALLS)
@torch.inference_mode()
def test_cached_call(
    benchmark: BenchmarkFixture, machine: Machine, measured: dict[str, float], name: str, what: str
) -> None:
    model, tokens, order, prompt = problem(name)
    engine, (content, queries) = as_engine(model), CALLS[what]
    cache = engine.prefill(tokens[None], order[None], torch.tensor([prompt]))
    known = torch.tensor([DECIDED])
    engine.draft(cache, tokens[None], known, known[:, None])
    ranks = DECIDED + torch.arange(queries) % (POSITIONS - DECIDED)

    def run() -> Tensor:
        cache.commit(known - content)
        return engine.head(engine.draft(cache, tokens[None], known, ranks[None]))

    expected = released_infilling.network(model, tokens, order, ranks, prompt, DECIDED)
    torch.testing.assert_close(run()[0], expected, rtol=0, atol=1e-4)
    seconds = best_seconds(benchmark, run)
    full = measured.get(name)
    benchmark.extra_info.update(
        table=table(name),
        method=what,
        milliseconds=seconds * 1e3,
        faster_than_transformers=full / seconds if full else None,
        goal=GOALS[name] if what.startswith("sequential") else None,
    )


def table(name: str) -> str:
    return f"one call, {name}, T = {POSITIONS}, {DECIDED} decided"


# -- whole texts, on a trained model: acceptance means nothing with random weights


@pytest.fixture(scope="module")
def text() -> tuple[Any, Tensor, Tensor]:
    """The embedded model, a text [1, N] and the mask [1, N] of what is to be filled."""
    model, tokenizer = pyquiet.load("tiny-any-subset")
    words = "Once upon a time there was a king who had three sons, and the youngest went out into the wide world. " * 30
    tokens = tokenizer(words, return_tensors="pt", verbose=False)["input_ids"][:, :LENGTH]
    given = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))[: int(GIVEN * LENGTH)]
    return model, tokens, torch.ones(1, LENGTH, dtype=torch.bool).index_fill(1, given, False)


def record(
    benchmark: BenchmarkFixture, measured: dict[str, float], method: str, seconds: float, calls: int, tokens: int
) -> None:
    measured[method] = seconds
    info = {"table": f"tiny-any-subset, {LENGTH} tokens, {GIVEN:.0%} given", "method": method, "seconds": seconds}
    for baseline in ("released, k=5", "sequential"):
        ratio = measured[baseline] / seconds if baseline in measured and baseline != method else None
        info[f"faster_than_{baseline.split(',')[0]}"] = ratio
    benchmark.extra_info.update(info, calls_a_token=calls / tokens)


def test_released_text(
    benchmark: BenchmarkFixture, machine: Machine, measured: dict[str, float], text: tuple[Any, Tensor, Tensor]
) -> None:
    model, tokens, mask = text
    order, prompt = order_from_mask(~mask[0])
    generator, calls = torch.Generator().manual_seed(0), []

    def run() -> None:
        calls.append(released_infilling.infill(model, tokens[0], order, int(prompt), DRAFTS, generator)[1])

    with watched(benchmark):
        benchmark.pedantic(run, rounds=1)
    record(benchmark, measured, "released, k=5", benchmark.stats.stats.min, calls[-1], int(mask.sum()))


@pytest.mark.parametrize(
    ("method", "k"),
    [
        ("sequential", "auto"),
        ("assd", 3),
        ("assd", 5),
        ("one_call", 1),
        ("one_call", 2),
        ("one_call", 4),
        ("auto", "auto"),
    ],
)
def test_text(
    benchmark: BenchmarkFixture,
    machine: Machine,
    measured: dict[str, float],
    text: tuple[Any, Tensor, Tensor],
    method: str,
    k: Any,
) -> None:
    model, tokens, mask = text
    fill: Callable[[int], Any] = lambda seed: pyquiet.infill(  # noqa: E731
        model, tokens, mask=mask, method=method, k=k, seed=seed, coupling="gumbel"
    )
    if method != "auto":  # what it has learned of costs is part of the method
        fill(9)
    results, seconds = [], []
    with watched(benchmark):

        def run() -> None:
            begin = time.perf_counter()
            results.append(fill(len(results)))
            seconds.append(time.perf_counter() - begin)

        benchmark.pedantic(run, rounds=ROUNDS)
    calls = sum(int(x.sum()) for result in results for x in result.calls.values()) / len(results)
    record(
        benchmark,
        measured,
        method if k == "auto" else f"{method}, k={k}",
        sum(seconds) / ROUNDS,
        calls,
        int(mask.sum()),
    )
