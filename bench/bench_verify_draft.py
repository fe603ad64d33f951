"""Verification of drafts on the CPU: the kernel against what a user would otherwise write, and against reading alone.

Four sets of buffers take turns, so that no row waits in a cache. Goals are those of the issue of this kernel.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from pyquiet.kernels import verify_draft
from pyquiet.randomness import Purpose, Stream, draw

from .machine import Machine
from .thought_attention_cases import name_of
from .timing import best_seconds
from .verify_draft_baselines import Problem, cdf, check, multinomial, ours, race

SETS = 4


METHODS: dict[str, Callable[[Problem], Tensor]] = {
    "multinomial": multinomial,
    "race": race,
    "cdf": cdf,
    "compiled cdf": torch.compile(cdf, dynamic=False),
    "verify_draft": ours,
    "verify_draft, draft_lse": lambda given: ours(given, given.lse),
}
SHAPES = [(1, 5, 32000), (1, 5, 151936), (64, 1, 50257)]
GOALS = {(1, 5, 32000): (15, None, None), (1, 5, 151936): (15, None, None), (64, 1, 50257): (60, 3, 0.75)}


@pytest.fixture(scope="module")
def measured() -> dict[tuple[object, ...], float]:
    """Seconds by shape, dtype and method, for the ratios of later benches."""
    return {}


def buffers(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Problem]:
    """The sets of a shape: the same numbers in memory of their own."""
    given = Problem.make(*shape, dtype, "cpu")
    return [given, *(Problem(*(x.clone() for x in vars(given).values())) for _ in range(SETS - 1))]


def read_by_contract(given: Problem) -> Tensor:
    """A copy of what must be read once: draft and target rows up to the first rejection, and the bonus row."""
    k = given.draft.shape[1]
    kept = verify_draft(given.target, given.draft, given.tokens, stream=Stream(0)).accepted
    rows = torch.arange(k + 1) <= kept[:, None]
    return torch.cat([given.target[rows].flatten(), given.draft[rows[:, :k]].flatten()])


def rotating(run: Callable[[Any], object], sets: list[Any]) -> Callable[[], object]:
    turn = itertools.cycle(sets)
    return lambda: run(next(turn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"B{s[0]}-k{s[1]}-V{s[2]}")
@pytest.mark.parametrize("method", ["read", *METHODS])
def test_verification(
    benchmark: BenchmarkFixture,
    machine: Machine,
    measured: dict[tuple[object, ...], float],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    method: str,
) -> None:
    sets: list[Any] = buffers(shape, dtype)
    run: Callable[[Any], object] = torch.sum
    if method == "read":
        sets = [read_by_contract(given) for given in sets]
    else:
        run = METHODS[method]
        if dtype == torch.float32 or method.startswith("verify_draft"):
            check(sets[0], run(sets[0]), method)
    measured[shape, dtype, method] = seconds = best_seconds(benchmark, rotating(run, sets))
    info: dict[str, object] = {"method": method, "microseconds": seconds * 1e6}
    if method == "verify_draft":
        eager, compiled, share = GOALS[shape]
        times = {name: measured.get((shape, dtype, name)) for name in ("read", *METHODS)}
        for name in ("multinomial", "race", "cdf", "compiled cdf"):
            info[f"faster_than_{name}"] = times[name] / seconds if times[name] else None
        info["of_reading"] = times["read"] / seconds if times["read"] else None
        info |= {
            "goal_eager": eager,
            "goal_compiled": compiled,
            "goal_of_reading": share and share - 0.15 * (dtype != torch.float32),
        }
    benchmark.extra_info.update(table=f"verify_draft, B, k, V = {shape}, {name_of(dtype)}", **info)


@pytest.mark.parametrize("coupling", ["rejection", "gumbel"])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_draw(benchmark: BenchmarkFixture, machine: Machine, rows: int, coupling: str) -> None:
    """One token a row, against torch.multinomial, which makes an exponential for every id."""
    sets = [torch.randn(rows, 32000, generator=torch.Generator().manual_seed(s)) for s in range(SETS)]
    turn = itertools.cycle(sets)
    stream = Stream(0, Purpose.DRAFT)
    theirs = min(_once(lambda: next(turn).softmax(-1).multinomial(1)) for _ in range(5))
    seconds = best_seconds(benchmark, lambda: draw(next(turn), stream=stream, coupling=coupling))
    benchmark.extra_info.update(
        table="draws, V = 32000, float32",
        method=f"{rows} rows, {coupling}",
        microseconds=seconds * 1e6,
        faster_than_multinomial=theirs / seconds,
    )


def test_overhead(benchmark: BenchmarkFixture, machine: Machine) -> None:
    """A call on rows that cost nothing."""
    logits, tokens = torch.randn(1, 2, 8), torch.zeros(1, 1, dtype=torch.int64)
    stream = Stream(0, sequence=0)
    seconds = best_seconds(benchmark, lambda: verify_draft(logits, logits[:, :1], tokens, stream=stream))
    benchmark.extra_info.update(table="a call, V = 8", method="verify_draft", microseconds=seconds * 1e6)


def _once(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
