"""Engines of test-time scaling: against the bound and the synchronous one, and what they cost themselves."""

import asyncio
import subprocess
import sys
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pyquiet.scaling.answers import extract
from pyquiet.scaling.backends.base import Backend, Choose, Generate, Generated, Score, Scored, Usage
from pyquiet.scaling.engine import run_async, run_sync
from pyquiet.scaling.panel import Panel
from pyquiet.scaling.plan import Plan, Pools
from pyquiet.scaling.policy import Chunk
from pyquiet.scaling.records import Decision, Question, Record
from pyquiet.scaling.score import MeanNLL
from pyquiet.scaling.session import Session, Setting
from pyquiet.scaling.simulation import Delayed, Latency, run_simulated
from pyquiet.scaling.views import Views

from .timing import best_seconds

TEXT = "so he has 12 + 7 = 19. "


class Canned:
    """A model that says the same at once, and no server behind it."""

    codec = None

    def __init__(self, name: str) -> None:
        self.identity = {"model": name}

    async def open(self) -> None: ...
    async def ready(self) -> None: ...
    async def close(self) -> None: ...
    def forget(self, chain: str) -> None: ...

    async def generate(self, request: Generate) -> Generated:
        return Generated(None, TEXT, "stop", Usage(len(request.prompt.text), 0, 12))

    async def score(self, request: Score) -> Scored:
        score = zlib.crc32(f"{request.chain} {len(request.prompt.text)}".encode()) % 1000 / 1000
        return Scored((-score,) * 12, Usage())

    async def choose(self, request: Choose) -> Scored:
        raise NotImplementedError


class FourInTen:
    """Takes over four chunks of ten, those of the largest scores."""

    together = False

    def decide(self, chunk: Chunk, uniform: float) -> Decision:
        assert chunk.score is not None
        return Decision("replace" if chunk.score > 0.6 else "accept", "bench")

    def decide_all(self, chunks: Any, uniforms: Any) -> list[Decision]:
        raise NotImplementedError

    def observe(self, chunk: Chunk, decision: Decision) -> None: ...


def setting(plan: Plan, draft: Backend, target: Backend, on_record: Callable[[Record], None] | None = None) -> Setting:
    return Setting(
        plan, draft, target, MeanNLL(min_tokens=1), FourInTen(), lambda q: Views(draft, target, q), extract,
        on_record=on_record,
    )  # fmt: skip


async def answer(made: Setting, engine: Callable[..., Awaitable[None]], questions: int) -> None:
    panels = (Panel(Question(str(i), "?"), i, range(made.plan.chains)) for i in range(questions))
    await engine(Session(made), panels)


# Lognormal service times of section 9 of the specification: mean seconds of a draft, a score, a takeover.
DRAFT, SCORE, TARGET = 5.0, 0.3, 12.0


@pytest.mark.parametrize("cv", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("questions", [1, 40])
def test_simulated(benchmark: BenchmarkFixture, cv: float, questions: int) -> None:
    """Virtual seconds of both engines, same policy, pools and latencies; the bound is work over slots, or a chain."""
    plan = Plan(chains=16, turns=8, pools=Pools(16, 8, 4))
    times: dict[str, float] = {}

    def simulate(engine: Callable[..., Awaitable[None]]) -> tuple[float, float, float]:
        work, last, chain = dict.fromkeys(("draft", "score", "target"), 0.0), [0.0], dict[Any, float]()

        def take(record: Record) -> None:
            if record.timing is not None:
                seconds, key = record.timing.ended - record.timing.started, record.key
                work[key.stage] += seconds
                chain[key.question, key.chain] = chain.get((key.question, key.chain), 0.0) + seconds
                last[0] = record.timing.ended

        draft = Delayed(Canned("draft"), Latency(DRAFT, cv))
        target = Delayed(Canned("target"), Latency(TARGET, cv), Latency(SCORE, cv))
        run_simulated(answer(setting(plan, draft, target, take), engine, questions))
        return last[0], max(work[name] / getattr(plan.pools, name) for name in work), max(chain.values())

    times["sync"], *_ = simulate(run_sync)
    times["async"], share, longest = benchmark.pedantic(simulate, (run_async,), rounds=1)
    benchmark.extra_info.update(
        table="makespan on a virtual clock, 16 chains of 8 turns a question, slots 16, 8, 4",
        shape=f"{questions} questions, cv {cv}",
        method="async",
        virtual_seconds=times["async"],
        over_bound=times["async"] / max(share, longest),
        longest_chain_over_work_a_slot=longest / share,  # the goal, 1.1 of the bound, is for at most 0.1
        sync_over_async=times["sync"] / times["async"],
    )


def test_overhead_of_a_stage(benchmark: BenchmarkFixture) -> None:
    """Processor time of a stage with 1,000 chains under way; each request gives way to the loop once."""
    plan = Plan(chains=100, turns=8, pools=Pools(400, 200, 400, 1000))
    stages = [0]

    def count(record: Record) -> None:
        stages[0] += record.key.stage != "end"

    draft, target = (Delayed(Canned(name), Latency(0.0)) for name in ("draft", "target"))
    made = setting(plan, draft, target, count)

    def run() -> None:
        stages[0] = 0
        asyncio.run(answer(made, run_async, 20))

    seconds = best_seconds(benchmark, run)
    benchmark.extra_info.update(
        table="engine, 1,000 chains under way, no journal",
        method="async",
        microseconds_a_stage=seconds / stages[0] * 1e6,
        goal=300,
    )


MEMORY = """
import asyncio, sys, pyquiet.scaling, torch
from pyquiet.scaling import ATTS
from bench.memory import resident_kib
from bench.bench_scaling import *
before = resident_kib("VmRSS")
plan = Plan(chains=100, turns=2, pools=Pools(400, 200, 400, 1000))
if sys.argv[1] == "engine":
    asyncio.run(answer(setting(plan, Canned("draft"), Canned("target")), run_async, 1000))
else:
    atts = ATTS(Canned("draft"), Canned("target"), plan=plan, policy=FourInTen(), score=MeanNLL(min_tokens=1))
    result = atts.run([f"{i}?" for i in range(1000)], journal=sys.argv[2] if sys.argv[1] == "journal" else None)
    assert result.report.outcomes == {"turns": 100_000}
print((resident_kib("VmHWM") - before) / 1024)
"""


@pytest.mark.parametrize("kept", ["engine", "results and report", "journal"])
def test_memory_of_many_chains(benchmark: BenchmarkFixture, tmp_path: Path, kept: str) -> None:
    """What 1e5 chains of two turns add to the process at most, in a process of their own: when nothing of them is kept,
    through `ATTS` with all results and the report, and with a journal besides."""

    def run() -> float:
        command = [sys.executable, "-c", MEMORY, kept, str(tmp_path / "run.jsonl")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(done.stdout)

    mib = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(table="memory of 1e5 chains", shape=kept, method="async", peak_mib=mib, goal=300)
