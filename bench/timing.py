"""How every figure is taken: warm, many rounds, the smallest one kept, other programs watched."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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
    with watched(benchmark):
        benchmark.pedantic(run, rounds=rounds, iterations=calls, warmup_rounds=1)
    return float(benchmark.stats.stats.min)


@contextmanager
def watched(benchmark: BenchmarkFixture) -> Iterator[None]:
    """Note in `extra_info["others"]` the share of all processors that other programs took.

    Two threads that wait for each other lose far more time to a third one than its share, and the
    smallest of many rounds does not show it.
    """
    begin, before = time.perf_counter(), foreign_seconds()
    yield
    after = foreign_seconds()
    if before is not None and after is not None:
        capacity = (time.perf_counter() - begin) * (os.cpu_count() or 1)
        benchmark.extra_info["others"] = max(0.0, after - before) / capacity


def foreign_seconds() -> float | None:
    """Return the processor seconds used so far by all programs but this one; None off Linux."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system
