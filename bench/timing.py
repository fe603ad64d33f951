"""How every figure is taken: warm, many rounds, the smallest one kept."""

import time
from collections.abc import Callable
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

# A shorter round repeats the call, so that the clock itself is not what is measured.
SHORTEST_ROUND = 5e-4
MOST_ROUNDS = 300
FEWEST_ROUNDS = 4


def best_seconds(benchmark: BenchmarkFixture, run: Callable[[], Any], budget: float = 1.2) -> float:
    """Return the seconds of the fastest call to `run` in the rounds that fit in `budget` seconds.

    The smallest time is the one least disturbed by whatever else the machine does.
    """
    run()
    begin = time.perf_counter()
    run()
    once = time.perf_counter() - begin
    calls = max(1, round(SHORTEST_ROUND / once))
    rounds = int(min(MOST_ROUNDS, max(FEWEST_ROUNDS, budget / (once * calls))))
    benchmark.pedantic(run, rounds=rounds, iterations=calls, warmup_rounds=1)
    return float(benchmark.stats.stats.min)
