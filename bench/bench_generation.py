"""Decoding with a thought before every token, at a prefix of 400 tokens, one sequence.

Cached generation against the release's way (the training forward over the whole prefix for every
token) and against the base model's own cached decoding. Prefill cancels: the time of a token is
the difference between two lengths of the answer, divided by the tokens between them.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from .machine import Machine
from .models import random_thinker
from .release_recompute import next_token
from .timing import best_seconds, watched

MODEL = "llama-15m"
THOUGHT_TOKENS = 5
PREFIX = 400
SHORT, LONG = 4, 20  # new tokens; those between them have a mean prefix of 400
PROMPT = PREFIX - (SHORT + LONG) // 2
ROUNDS = 8
TOLERANCE = 1e-4
TABLE = f"seconds a token, {MODEL}, m = {THOUGHT_TOKENS}, prefix {PREFIX}"
# What m + 3 token passes in place of one may cost: half as much again for the smaller calls.
SLOWDOWN_GOAL = 1.5 * (THOUGHT_TOKENS + 3)


@pytest.fixture(scope="module")
def thinker() -> Any:
    """A thinking model on random weights; its mixing weight and its END are not a fresh one's."""
    return random_thinker(MODEL, thought_tokens=THOUGHT_TOKENS)


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    """Seconds a token by method, for the ratios of the last bench."""
    return {}


def text(length: int) -> Tensor:
    """Return random token ids [1, length]."""
    return torch.randint(3, 32000, (1, length), generator=torch.Generator().manual_seed(0))


def seconds_per_token(benchmark: BenchmarkFixture, generate: Callable[[int], Any]) -> float:
    """Return the seconds of one more token, given `generate(number of new tokens)`."""
    generate(LONG)
    short = []
    with watched(benchmark):
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            generate(SHORT)
            short.append(time.perf_counter() - begin)
        benchmark.pedantic(generate, args=(LONG,), rounds=ROUNDS)
    return float(benchmark.stats.stats.min - min(short)) / (LONG - SHORT)


def test_release_recompute(
    benchmark: BenchmarkFixture, machine: Machine, thinker: Any, measured: dict[str, float]
) -> None:
    ids = text(PREFIX)
    ours = thinker.think_at_every_token(ids, seed=0)
    with torch.no_grad():
        expected = thinker(ids, think="always", seed=0).logits[0, -1]
    theirs = next_token(thinker, ids[0], thoughts=ours.tokens[0, :, 0])
    assert abs(theirs.weight) > 0.01
    torch.testing.assert_close(theirs.logits, expected.float(), rtol=0, atol=TOLERANCE)
    assert theirs.token_passes == PREFIX * (THOUGHT_TOKENS + 3)

    seconds = best_seconds(benchmark, lambda: next_token(thinker, ids[0]), budget=4)
    measured["release"] = seconds
    benchmark.extra_info.update(
        table=TABLE, method="release", milliseconds=seconds * 1e3, token_passes=theirs.token_passes
    )


def test_base_cached(benchmark: BenchmarkFixture, machine: Machine, thinker: Any, measured: dict[str, float]) -> None:
    ids = text(PROMPT)

    def generate(new: int) -> Tensor:
        out = thinker.base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        assert out.shape[1] == PROMPT + new
        return out

    seconds = seconds_per_token(benchmark, generate)
    measured["base"] = seconds
    benchmark.extra_info.update(table=TABLE, method="base, cached", milliseconds=seconds * 1e3, token_passes=1)


def test_thinking_cached(
    benchmark: BenchmarkFixture, machine: Machine, thinker: Any, measured: dict[str, float]
) -> None:
    ids = text(PROMPT)

    def generate(new: int) -> Any:
        out = thinker.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, seed=0,
            think="always", do_sample=False, return_dict_in_generate=True, return_thoughts=True,
        )  # fmt: skip
        assert out.sequences.shape[1] == PROMPT + new
        return out

    long = generate(LONG)
    passes = (long.token_passes - generate(SHORT).token_passes).item() / (LONG - SHORT)
    assert passes == THOUGHT_TOKENS + 3
    check_last_token(thinker, long)

    seconds = seconds_per_token(benchmark, generate)
    release, base = measured.get("release"), measured.get("base")
    benchmark.extra_info.update(
        table=TABLE,
        method="pyquiet, cached",
        milliseconds=seconds * 1e3,
        token_passes=passes,
        faster_than_release=release / seconds if release else None,
        slower_than_base=seconds / base if base else None,
        slowdown_goal=SLOWDOWN_GOAL,
    )


def check_last_token(thinker: Any, generated: Any) -> None:
    """The release's way, given the same last thought, chooses the last generated token too."""
    before = generated.sequences[0, :-1]
    thoughts = generated.thoughts.tokens[0, -1, 0].expand(len(before), -1)
    theirs = next_token(thinker, before, thoughts=thoughts)
    assert abs(theirs.weight - generated.thoughts.weight[0, -1, 0].item()) < TOLERANCE
    assert theirs.logits.argmax() == generated.sequences[0, -1]
