"""Whole runs against servers that fail: every chain ends, accounts are exact, and nothing is done twice."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyquiet.scaling.answers import extract
from pyquiet.scaling.backends.base import GoneError, RefusedError
from pyquiet.scaling.backends.openai import OpenAIBackend
from pyquiet.scaling.calls import Retry
from pyquiet.scaling.engine import run_async
from pyquiet.scaling.journal import Journal, read_journal
from pyquiet.scaling.panel import Panel
from pyquiet.scaling.plan import Plan, Pools, Sampling
from pyquiet.scaling.policy import Chunk
from pyquiet.scaling.records import Decision, Question, Record
from pyquiet.scaling.score import MeanNLL
from pyquiet.scaling.session import Session, Setting
from pyquiet.scaling.views import Views

from .loopback import Loopback
from .toy_language import ToyCodec

QUESTIONS = [Question(f"q{i}", f"What is {i}?") for i in range(6)]
PLAN = Plan(
    chains=4, turns=5, draft=Sampling(12), target=Sampling(12), stop=("\n",), seed=3, pools=Pools(8, 4, 4, inflight=24)
)
HEADER = {"run": "loopback"}
FAULTS = dict.fromkeys(["500", "429", "503", "reset", "cut", "garbage", "empty", "null", "nan", "short", "hang"], 0.02)
RETRY = Retry(tries=40, base=0.001, cap=0.01)


class Threshold:
    """Takes over where the score is above a cut."""

    together = False

    def decide(self, chunk: Chunk, uniform: float) -> Decision:
        bad = chunk.score is not None and chunk.score > 2.6
        return Decision("continue" if bad else "accept", "test")

    def decide_all(self, chunks: Sequence[Chunk], uniforms: Sequence[float]) -> list[Decision]:
        raise NotImplementedError

    def observe(self, chunk: Chunk, decision: Decision) -> None: ...


@asynccontextmanager
async def pair(
    draft: Loopback, target: Loopback, *, timeout: float = 20.0, **options: Any
) -> AsyncIterator[list[OpenAIBackend]]:
    """Backends of two servers that run, opened, and the servers' accounts at zero.

    A time-out that is as short as an answer on a busy machine would count good answers as faults.
    """
    settings = {"tokenizer": ToyCodec(), "probe_every": 0.005, "score_timeout": 5.0} | options
    backends = [OpenAIBackend(server.url, **settings) for server in (draft, target)]
    for backend, server in zip(backends, (draft, target), strict=True):
        await backend.open()
        backend._generate_timeout = backend._score_timeout = timeout
        server.reset()
    try:
        yield backends
    finally:
        for backend in backends:
            await backend.close()


async def run(
    backends: list[OpenAIBackend],
    path: Path,
    on_record: Callable[[Record], None] | None = None,
    *,
    retry: Retry = RETRY,
    plan: Plan = PLAN,
) -> list[Panel]:
    """A run, or the rest of the one that the journal has the beginning of."""
    draft, target = backends
    setting = Setting(
        plan, draft, target, MeanNLL(min_tokens=1), Threshold(), lambda q: Views(draft, target, q), extract,
        retry=retry, on_record=on_record,
    )  # fmt: skip
    with Journal.open(path, HEADER) if path.exists() else Journal.create(path, HEADER) as journal:
        session = Session(setting, journal, list(journal.records))
        panels = [Panel(question, i, range(PLAN.chains)) for i, question in enumerate(QUESTIONS)]
        await run_async(session, panels)
    return panels


def transcript(path: Path) -> dict[Any, Record]:
    """Records by their key, without what depends on the clock and faults; a key that comes twice is an error."""
    records = [record for record in read_journal(path)[1] if record.key.stage != "lost"]
    by_key = {record.key: replace(record, timing=None) for record in records}
    assert len(by_key) == len(records)
    return by_key


def of(path: Path, stage: str) -> list[Record]:
    return [record for record in read_journal(path)[1] if record.key.stage == stage]


def check_ends(path: Path, panels: list[Panel]) -> None:
    assert [len(panel.results) for panel in panels] == [PLAN.chains] * len(QUESTIONS)
    ends = of(path, "end")
    assert len(ends) == PLAN.chains * len(QUESTIONS)
    assert {record.outcome for record in ends} <= {"answer", "eos", "turns"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Record]:
    """The transcript of the run on servers without faults."""
    path = tmp_path_factory.mktemp("undisturbed") / "run.jsonl"

    async def go() -> None:
        async with Loopback() as draft, Loopback("sglang", salt=1) as target, pair(draft, target) as backends:
            panels = await run(backends, path)
            check_ends(path, panels)
            assert draft.account.faulty() == target.account.faulty() == 0

    asyncio.run(go())
    stages = [key.stage for key in transcript(path)]
    assert min(stages.count(stage) for stage in ("draft", "score", "target")) > 10  # the run is worth the tests
    return transcript(path)


async def counted(*servers: Loopback) -> None:
    """Waits until servers have counted what they have answered."""
    async with asyncio.timeout(10):
        while any(server.account.in_flight for server in servers):
            await asyncio.sleep(0.001)


async def check_accounts(path: Path, draft: Loopback, target: Loopback) -> None:
    """Good answers, tokens and tries are on both sides the same."""
    await counted(draft, target)
    drafts, scores, targets = (of(path, stage) for stage in ("draft", "score", "target"))
    scored = [record for record in scores if record.timing is not None]
    assert draft.account.good() == draft.account.good("generate") == len(drafts)
    assert target.account.good("generate") == len(targets)
    assert target.account.good("score") == len(scored)
    for account, records in ((draft.account, drafts), (target.account, scored + targets)):
        assert account.prompt_tokens == sum(r.usage.prompt_tokens for r in records)
        assert account.completion_tokens == sum(r.usage.completion_tokens for r in records)


def tries(records: list[Record]) -> int:
    return sum(record.timing.tries for record in records if record.timing is not None)


@pytest.mark.parametrize(("one", "other"), [("vllm", "sglang"), ("sglang", "vllm")])
def test_all_faults_at_once_change_nothing_but_the_cost(
    one: str, other: str, undisturbed: dict[Any, Record], tmp_path: Path
):
    path = tmp_path / "run.jsonl"

    async def go() -> None:
        async with (
            Loopback(one) as draft,
            Loopback(other, salt=1) as target,
            pair(draft, target, timeout=1.0) as backends,  # what a hanging request costs
        ):
            draft.mix(FAULTS, seed=1)
            target.mix(FAULTS, seed=2)
            check_ends(path, await run(backends, path))
            await check_accounts(path, draft, target)
            for server, stages in ((draft, ("draft",)), (target, ("score", "target"))):
                met = sum(server.account.requests.values())
                assert met == sum(tries(of(path, stage)) for stage in stages)
                assert met - server.account.good() > 5

    asyncio.run(go())
    found = transcript(path)
    assert found.keys() == undisturbed.keys()
    cost = replace  # what a scoring request writes differs between dialects, and with it what it costs
    assert {k: cost(r, usage=None) for k, r in found.items()} == {  # type: ignore[arg-type]
        k: cost(r, usage=None)
        for k, r in undisturbed.items()  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("slow", [False, True])
def test_requests_that_are_given_up_or_cancelled_are_in_the_accounts(slow: bool, tmp_path: Path):
    path = tmp_path / "run.jsonl"

    async def go() -> None:
        async with (
            Loopback(latency=0.005) as draft,
            Loopback("sglang", salt=1, latency=0.005) as target,
            pair(draft, target) as backends,
        ):
            for server in (draft, target):
                server.mix(dict.fromkeys(["500", "reset", "garbage", "null"], 0.0 if slow else 0.1), seed=1)
            plan = replace(PLAN, chain_seconds=0.03) if slow else PLAN
            await run(backends, path, retry=Retry(tries=2, base=0.001), plan=plan)
            await counted(draft, target)
            records = [record for record in read_journal(path)[1] if record.timing is not None]
            lost = [record for record in records if record.key.stage == "lost"]
            for server, stages in ((draft, ("draft",)), (target, ("score", "target"))):
                sent = tries([record for record in records if record.stage in stages])
                unmet = sent - sum(server.account.requests.values())
                # One that is cancelled at once may not have left this side.
                assert 0 <= unmet <= sum(record.outcome == "cancelled" for record in lost if record.stage in stages)
            assert {record.outcome for record in lost} == {"cancelled" if slow else "failed"}
            if not slow:
                await check_accounts(path, draft, target)

    asyncio.run(go())
    outcomes = {record.outcome for record in of(path, "end")}
    assert ("deadline" if slow else "failed") in outcomes


def test_servers_that_die_and_come_back_are_waited_for(undisturbed: dict[Any, Record], tmp_path: Path):
    path = tmp_path / "run.jsonl"

    async def go() -> None:
        async with Loopback() as draft, Loopback("sglang", salt=1) as target, pair(draft, target) as backends:
            seen = 0

            def killing(record: Record) -> None:
                nonlocal seen
                seen += 1
                if seen in (40, 90):
                    (draft if seen == 40 else target).inject("die", 0.05)

            check_ends(path, await run(backends, path, killing))
            await check_accounts(path, draft, target)
            for server in (draft, target):
                assert sum(server.account.requests[kind, "die"] for kind in ("generate", "score", "other")) == 1

    asyncio.run(go())
    assert transcript(path) == undisturbed


def test_a_run_whose_server_stays_away_stops_and_is_resumed_to_the_same_end(
    undisturbed: dict[Any, Record], tmp_path: Path
):
    path = tmp_path / "run.jsonl"

    async def go() -> None:
        async with Loopback() as draft, Loopback("sglang", salt=1) as target:
            good = 0
            for stop_after in (30, 80):
                async with pair(draft, target, give_up_s=0.05) as backends:
                    seen = 0

                    def killing(record: Record, after: int = stop_after) -> None:
                        nonlocal seen
                        seen += 1
                        if seen == after:
                            target.inject("die", 60.0)

                    with pytest.raises(GoneError):
                        await run(backends, path, killing)
                good += target.account.good()
                await target.start()
            kept = len(of(path, "score")) + len(of(path, "target"))
            async with pair(draft, target) as backends:
                check_ends(path, await run(backends, path))
            wanted = len(of(path, "score")) + len(of(path, "target"))
            assert target.account.good() == wanted - kept  # nothing that was committed is asked for again
            assert 0 <= good - kept <= 2 * (PLAN.pools.score + PLAN.pools.target)  # answered, and the run stopped there

    asyncio.run(go())
    assert transcript(path) == undisturbed


def test_a_target_without_the_log_probs_it_needs_stops_the_run_by_name(tmp_path: Path):
    async def go() -> None:
        async with (
            Loopback() as draft,
            Loopback(without=("prompt_logprobs", "echo")) as target,
            pair(draft, target) as backends,
        ):
            with pytest.raises(RefusedError, match="JudgeGrade"):
                await run(backends, tmp_path / "run.jsonl")

    asyncio.run(go())


def test_texts_that_outgrow_a_context_end_their_chains_and_no_others(tmp_path: Path):
    path = tmp_path / "run.jsonl"

    async def go() -> None:
        async with Loopback(context=48) as draft, Loopback("sglang", salt=1) as target, pair(draft, target) as backends:
            panels = await run(backends, path)
            assert sum(len(panel.results) for panel in panels) == PLAN.chains * len(QUESTIONS)
            await check_accounts(path, draft, target)

    asyncio.run(go())
    outcomes = {record.outcome for record in of(path, "end")}
    assert "context" in outcomes
    assert outcomes - {"context"}
    assert "failed" not in outcomes
