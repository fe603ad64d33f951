"""Engines of test-time scaling on servers: seconds of the async one, of the synchronous one, and of the bound.

Two servers on 127.0.0.1, in threads of this process, answer in both dialects after the times of section 9 of the
specification, fifty times shorter. What the client and the servers themselves cost is part of it.
"""

import asyncio
import itertools
import math
import random
import statistics
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pyquiet.scaling.backends.openai import OpenAIBackend
from pyquiet.scaling.engine import run_async, run_sync
from pyquiet.scaling.panel import Panel
from pyquiet.scaling.plan import Plan, Pools, Sampling
from pyquiet.scaling.policy import Chunk
from pyquiet.scaling.records import Decision, Question, Record
from pyquiet.scaling.score import MeanNLL
from pyquiet.scaling.session import Session, Setting
from pyquiet.scaling.views import Views
from tests.scaling.loopback import Loopback, serving
from tests.scaling.toy_language import ToyCodec

DRAFT, SCORE, TARGET = 0.1, 0.006, 0.24  # mean seconds
SAMPLING = Sampling(8)
PLAN = Plan(chains=16, turns=3, draft=SAMPLING, target=SAMPLING, pools=Pools(16, 8, 4))


class ByLot:
    """Takes over four chunks of ten, whatever their scores."""

    together = False

    def decide(self, chunk: Chunk, uniform: float) -> Decision:
        return Decision("continue" if uniform < 0.4 else "accept", "bench")

    def decide_all(self, chunks: Any, uniforms: Any) -> list[Decision]:
        raise NotImplementedError

    def observe(self, chunk: Chunk, decision: Decision) -> None: ...


def lognormal(mean: float, cv: float, seed: int) -> Iterator[float]:
    """Seconds of that law again and again: 64 of its quantiles in a random order, so that all runs have equal work."""
    law = statistics.NormalDist(-0.5 * (variance := math.log1p(cv**2)), variance**0.5)
    values = [mean * math.exp(law.inv_cdf((i + 0.5) / 64)) for i in range(64)]
    random.Random(seed).shuffle(values)
    return itertools.cycle(values)


def latency(cv: float, **means: float) -> Callable[[str], float]:
    """What a server waits by the kind of a request."""
    waits = {kind: lognormal(mean, cv, seed) for seed, (kind, mean) in enumerate(means.items())}
    return lambda kind: next(waits[kind]) if kind in waits else 0.0


async def answer(
    engine: Callable[..., Awaitable[None]], draft: Loopback, target: Loopback, questions: int
) -> list[Record]:
    """The records of a run."""
    models = [OpenAIBackend(server.url, tokenizer=ToyCodec()) for server in (draft, target)]
    records: list[Record] = []
    for model in models:
        await model.open()
    setting = Setting(
        PLAN, *models, MeanNLL(min_tokens=1), ByLot(), lambda q: Views(*models, q), lambda text: None,
        on_record=records.append,
    )  # fmt: skip
    panels = (Panel(Question(str(i), f"What is {i}?"), i, range(PLAN.chains)) for i in range(questions))
    await engine(Session(setting), panels)
    for model in models:
        await model.close()
    return records


def makespan(records: list[Record]) -> tuple[float, float]:
    """Seconds of a run, and those it needs at least: the work of a pool over its slots, or the longest chain."""
    work, chains, first, last = dict[str, float](), dict[Any, float](), float("inf"), 0.0
    for record in records:
        if record.timing is not None:
            seconds, key = record.timing.ended - record.timing.started, record.key
            work[key.stage] = work.get(key.stage, 0.0) + seconds
            chains[key.question, key.chain] = chains.get((key.question, key.chain), 0.0) + seconds
            first, last = min(first, record.timing.queued), max(last, record.timing.ended)
    return last - first, max(*(total / getattr(PLAN.pools, pool) for pool, total in work.items()), *chains.values())


@pytest.mark.parametrize("cv", [0.2, 1.0])
@pytest.mark.parametrize("questions", [1, 8])
def test_on_servers(benchmark: BenchmarkFixture, cv: float, questions: int) -> None:
    """The best of two runs of each engine, which must give the same transcripts."""
    found: dict[str, tuple[float, float]] = {}
    transcripts = []

    def measure(engine: Callable[..., Awaitable[None]], name: str) -> None:
        with (
            serving(latency=latency(cv, generate=DRAFT)) as draft,
            serving("sglang", salt=1, latency=latency(cv, score=SCORE, generate=TARGET)) as target,
        ):
            records = asyncio.run(answer(engine, draft, target, questions))
        found[name] = min(found.get(name, (float("inf"), 0.0)), makespan(records))
        transcripts.append(sorted((replace(record, timing=None) for record in records), key=lambda r: r.key))

    for _ in range(2):
        measure(run_sync, "sync")
    benchmark.pedantic(measure, (run_async, "async"), rounds=2)
    assert all(transcript == transcripts[0] for transcript in transcripts)
    seconds, bound = found["async"]
    benchmark.extra_info.update(
        table="makespan on loopback servers, 16 chains of 3 turns a question, slots 16, 8, 4",
        shape=f"{questions} questions, cv {cv}",
        method="async",
        seconds=seconds,
        over_bound=seconds / bound,
        sync_over_async=found["sync"][0] / seconds,
    )
