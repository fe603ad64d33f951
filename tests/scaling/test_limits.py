"""Hard caps on takeovers: counted in a run alone, and counted on where a journal resumes it."""

import asyncio
from typing import Any

import pytest

from pyquiet.scaling.limits import TakeoverLimit
from pyquiet.scaling.records import Decision, Key, Record, Timing
from pyquiet.scaling.simulation import run_simulated


def taken(question: str, at: float, stage: Any = "score") -> Record:
    decision = Decision("continue", "p") if stage == "score" else None
    return Record(Key("run", question, 0, int(at), stage), timing=Timing(at, at, at, 0), decision=decision)


def accepted(at: float) -> Record:
    return Record(Key("run", "a", 1, int(at), "score"), timing=Timing(at, at, at, 0), decision=Decision("accept", "p"))


def test_takeovers_on_file_count_and_those_of_another_run_do_not() -> None:
    limit = TakeoverLimit(per_question=2)
    first = limit.fresh()
    assert [first.take("a") for _ in range(3)] == [True, True, False]
    assert limit.fresh().take("a")
    resumed = limit.fresh([taken("a", 0), taken("b", 1), accepted(2), taken("b", 3), taken("b", 3, "target")])
    assert [resumed.take("a") for _ in range(2)] == [True, False]
    assert not resumed.take("b")


def test_the_bucket_goes_on_where_it_stood() -> None:
    async def left(*done: Record) -> int:
        limit = TakeoverLimit(per_minute=3, when_empty="accept").fresh(done)
        return sum(limit.take("a") for _ in range(9))

    assert asyncio.run(left()) == 3
    assert asyncio.run(left(taken("a", 0), taken("b", 1))) == 1
    assert asyncio.run(left(taken("a", 0), taken("b", 1), accepted(22))) == 2  # a takeover's worth has come in since
    assert asyncio.run(left(taken("a", 0), taken("b", 1), accepted(500))) == 3

    async def waits(*done: Record) -> list[bool]:
        limit = TakeoverLimit(per_minute=3).fresh(done)
        tasks = [asyncio.ensure_future(limit.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        found = [not task.done() for task in tasks]
        for task in tasks:
            task.cancel()
        return found

    assert asyncio.run(waits()) == [False] * 3
    assert asyncio.run(waits(taken("a", 0), taken("a", 0, "target"), taken("b", 1))) == [False, False, True]


def test_one_that_is_cancelled_while_it_waits_takes_nothing() -> None:
    async def waited() -> float:
        limit, loop = TakeoverLimit(per_minute=1).fresh(), asyncio.get_running_loop()
        await limit.wait()
        gone = asyncio.ensure_future(limit.wait())
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        await limit.wait()
        return loop.time()

    assert run_simulated(waited()) == pytest.approx(60)
