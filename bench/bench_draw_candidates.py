"""Draws of candidates on the CPU: the kernel against what a user would otherwise write, and against one log-sum-exp.

Two sets of rows, each larger than the caches, take turns. Goals are those of the issue of this kernel.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from pyquiet.kernels import draw_candidates, draw_candidates_from_hidden, resample
from pyquiet.randomness import Stream

from .draw_candidates_baselines import STREAM, Drawn, Problem, cdf, check, multinomial, ours, race
from .machine import Machine
from .memory import peak_mib
from .thought_attention_cases import name_of
from .timing import best_seconds

R, V = 256, 50257


def logsumexp(given: Problem) -> Tensor:
    """Our own pass over the rows: what is left of a draw where there is nothing to choose."""
    return draw_candidates(given.logits, 1, stream=STREAM, temperature=0).lse


METHODS: dict[str, Callable[[Problem], Drawn]] = {
    "multinomial": multinomial,
    "cdf": cdf,
    "compiled cdf": torch.compile(cdf, dynamic=False),
    "race": race,
    "draw_candidates": ours,
}
CASES = [
    pytest.param(dtype, k, method, id=f"{name_of(dtype)}-k{k}-{method}")
    for dtype in (torch.float32, torch.bfloat16)
    for k in (1, 8, 16, 32)
    for method in METHODS
    if (method != "race" or (k in (1, 16) and dtype == torch.float32))  # seconds a call
    and (method != "compiled cdf" or k == 16)  # half a minute of compiling
]


@pytest.fixture(scope="module")
def measured() -> dict[tuple[object, ...], float]:
    """Seconds by dtype, k and method, for the ratios of later benches."""
    return {}


def rotating(given: Problem, run: Callable[[Problem], object]) -> Callable[[], object]:
    turn = itertools.cycle([given, Problem(given.logits.clone(), given.u)])
    return lambda: run(next(turn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("method", ["read", "logsumexp", "torch.logsumexp"])
def test_reading(
    benchmark: BenchmarkFixture,
    machine: Machine,
    measured: dict[tuple[object, ...], float],
    dtype: torch.dtype,
    method: str,
) -> None:
    runs = {
        "read": lambda given: given.logits.sum(),
        "logsumexp": logsumexp,
        "torch.logsumexp": lambda given: given.logits.logsumexp(-1),
    }
    given = Problem.make(R, 1, V, dtype, "cpu")
    measured[dtype, method] = seconds = best_seconds(benchmark, rotating(given, runs[method]))
    benchmark.extra_info.update(
        table=f"one pass, {R} x {V}, {name_of(dtype)}", method=method, milliseconds=seconds * 1e3
    )


@pytest.mark.parametrize(("dtype", "k", "method"), CASES)
def test_candidates(
    benchmark: BenchmarkFixture,
    machine: Machine,
    measured: dict[tuple[object, ...], float],
    dtype: torch.dtype,
    k: int,
    method: str,
) -> None:
    given, run = Problem.make(R, k, V, dtype, "cpu"), METHODS[method]
    few = Problem(given.logits[:4], given.u[:4])
    check(few, run(few), "pyquiet" if run is ours else method)
    measured[dtype, k, method] = seconds = best_seconds(benchmark, rotating(given, run))
    info: dict[str, object] = {
        "method": method,
        "milliseconds": seconds * 1e3,
        "peak_mib": peak_mib(lambda: run(given)),
    }
    if run is ours:
        times = {name: measured.get((dtype, k, name)) for name in METHODS}
        info |= {f"faster_than_{name}": t / seconds for name, t in times.items() if t and name != method}
        bases = {"logsumexp": measured.get((dtype, "logsumexp")), "k1": measured.get((dtype, 1, method))}
        info |= {f"of_{name}": seconds / t for name, t in bases.items() if t}
        info |= {"logits_mib": given.logits.nbytes / 2**20}
        goals = {1: {"eager": 5}, 8: {"eager": 5}, 16: {"eager": 5, "race": 50, "of_logsumexp": 1.5}}
        info |= {f"goal_{name}": goal for name, goal in goals.get(k, {"eager": 5, "of_k1": 1.4}).items()}
    benchmark.extra_info.update(table=f"draw_candidates, {R} x {V}, k = {k}, {name_of(dtype)}", **info)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.8}, {"top_k": 50}, {"top_p": 0.9}, {"deterministic": True}], ids=str
)
def test_processed(benchmark: BenchmarkFixture, machine: Machine, options: dict[str, float]) -> None:
    """What processing and integers add, k = 16."""
    given = Problem.make(R, 16, V, torch.float32, "cpu")
    seconds = best_seconds(
        benchmark, rotating(given, lambda x: draw_candidates(x.logits, 16, stream=STREAM, **options))
    )
    benchmark.extra_info.update(
        table=f"processed, {R} x {V}, k = 16, float32", method=str(options), milliseconds=seconds * 1e3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("method", ["linear, then draw_candidates", "draw_candidates_from_hidden"])
def test_from_hidden(benchmark: BenchmarkFixture, machine: Machine, method: str, dtype: torch.dtype) -> None:
    """Of hidden states of GPT-2's size, k = 16: the product takes the time, the logits the memory."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 768, generator=g).to(dtype) for n in (1024, V))
    hidden /= 16

    def whole() -> object:
        return draw_candidates(torch.nn.functional.linear(hidden, weight), 16, stream=STREAM)

    run = (
        whole if method.startswith("linear") else lambda: draw_candidates_from_hidden(hidden, weight, 16, stream=STREAM)
    )
    seconds = best_seconds(benchmark, run)
    benchmark.extra_info.update(
        table=f"from hidden states, 1024 x 768 by {V}, {name_of(dtype)}",
        method=method,
        milliseconds=seconds * 1e3,
        peak_mib=peak_mib(run),
    )


@pytest.mark.parametrize("scheme", ["draw_candidates", "systematic", "residual"])
def test_overhead(benchmark: BenchmarkFixture, machine: Machine, scheme: str) -> None:
    """Calls on rows that cost nothing: 16 of 8."""
    rows, stream = torch.randn(16, 8), Stream(0, sequence=0)
    if scheme == "draw_candidates":
        seconds = best_seconds(benchmark, lambda: draw_candidates(rows, 1, stream=stream))
    else:
        seconds = best_seconds(benchmark, lambda: resample(rows, scheme=scheme, stream=stream))
    benchmark.extra_info.update(table="calls on 16 x 8", method=scheme, microseconds=seconds * 1e6)
