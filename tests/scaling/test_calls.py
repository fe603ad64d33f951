"""Requests on the wire: slots, and servers that are lost while requests wait for them."""

import asyncio

import pytest

from pyquiet.scaling.backends.base import GoneError, TransientError
from pyquiet.scaling.calls import Caller, Pool, Retry, together
from pyquiet.scaling.records import Timing

from .fake_models import HashModel


class Mortal(HashModel):
    """Is lost with the request at which it dies, and back after a while, or never."""

    def __init__(self, dies_at: int, *, back: bool = True) -> None:
        super().__init__("mortal")
        self.up, self.sent, self.dies_at, self.back = asyncio.Event(), 0, dies_at, back
        self.up.set()

    async def ready(self) -> None:
        if not self.back and not self.up.is_set():
            raise GoneError("away for too long")
        await self.up.wait()

    async def send(self) -> int:
        self.sent += 1
        await asyncio.sleep(0)
        if not self.up.is_set():
            raise TransientError("lost")
        if self.sent == self.dies_at:
            self.up.clear()
            asyncio.get_running_loop().call_later(0.01, self.up.set)
            raise TransientError("lost")
        return self.sent


def nothing_lost(timing: Timing, error: BaseException) -> None:
    raise AssertionError(timing, error)


def test_a_request_that_is_given_up_or_cancelled_is_told_with_its_last_try() -> None:
    lost: list[tuple[Timing, BaseException]] = []

    async def fail() -> None:
        raise TransientError("never")

    async def go() -> None:
        caller = Caller(HashModel("a"), Pool(1), Retry(tries=3, base=0), 0.0)
        with pytest.raises(TransientError):
            await caller.call(fail, (), lambda *loss: lost.append(loss))
        hanging = asyncio.ensure_future(caller.call(asyncio.Event().wait, (), lambda *loss: lost.append(loss)))
        waiting = asyncio.ensure_future(caller.call(asyncio.Event().wait, (), nothing_lost))
        await asyncio.sleep(0.01)
        hanging.cancel()
        waiting.cancel()
        await asyncio.gather(hanging, waiting, return_exceptions=True)
        assert await caller.pool.acquire() == 0

    asyncio.run(go())
    assert [(timing.tries, type(error)) for timing, error in lost] == [(3, TransientError), (1, asyncio.CancelledError)]
    assert lost[1][0].ended - lost[1][0].started >= 0.009


def test_an_error_of_one_of_several_ends_the_others_first() -> None:
    ended: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("other")

    async def fail() -> None:
        await asyncio.sleep(0)
        raise GoneError("away")

    with pytest.raises(GoneError):
        asyncio.run(together([wait(), fail()]))
    assert ended == ["other"]
    assert asyncio.run(together(asyncio.sleep(0, i) for i in range(3))) == [0, 1, 2]


def test_a_server_that_dies_costs_no_try_of_those_that_wait_for_a_slot() -> None:
    async def go() -> tuple[list[int], int]:
        backend = Mortal(dies_at=1)
        caller = Caller(backend, Pool(1), Retry(base=0), 0.0)
        calls = (caller.call(backend.send, (), nothing_lost) for _ in range(5))
        timings = [timing for _, timing in await asyncio.gather(*calls)]
        return [timing.tries for timing in timings], backend.sent

    tries, sent = asyncio.run(go())
    assert sorted(tries) == [1, 1, 1, 1, 2]
    assert sent == 6


def test_a_server_that_stays_away_frees_the_slots() -> None:
    async def go() -> None:
        backend, pool = Mortal(dies_at=1, back=False), Pool(1)
        caller = Caller(backend, pool, Retry(base=0), 0.0)
        lost: list[tuple[Timing, BaseException]] = []
        calls = (caller.call(backend.send, (), lambda *loss: lost.append(loss)) for _ in range(3))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [GoneError] * 3
        ((timing, error),) = lost  # the two that were never sent are no loss
        assert (timing.tries, type(error)) == (1, GoneError)
        async with asyncio.timeout(1):
            assert await pool.acquire() == 0

    asyncio.run(go())


def test_a_server_is_obeyed_for_so_long_and_no_longer() -> None:
    retry = Retry()
    assert retry.pause(1, TransientError("busy", retry_after=7.0)) == 7.0
    assert retry.pause(1, TransientError("busy", retry_after=86400.0)) == 60.0
    assert 0 <= retry.pause(1, TransientError("busy")) <= 1.0


@pytest.mark.parametrize("order", [((0,), (0,), (0,)), ((2,), (1,), (0,))])
def test_the_lowest_rank_gets_the_next_slot_and_equal_ones_by_arrival(order: tuple[tuple[int], ...]) -> None:
    async def go() -> list[int]:
        pool, got = Pool(1), list[int]()
        slot = await pool.acquire()

        async def wait(number: int) -> None:
            mine = await pool.acquire(order[number])
            got.append(number)
            pool.release(mine)

        waiting = [asyncio.ensure_future(wait(i)) for i in range(3)]
        await asyncio.sleep(0)
        pool.release(slot)
        await asyncio.gather(*waiting)
        return got

    assert asyncio.run(go()) == sorted(range(3), key=lambda i: order[i])
