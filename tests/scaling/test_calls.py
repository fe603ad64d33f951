"""Requests on the wire: slots, and servers that are lost while requests wait for them."""

import asyncio

import pytest

from pyquiet.scaling.backends.base import GoneError, TransientError
from pyquiet.scaling.calls import Caller, Pool, Retry

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


def test_a_server_that_dies_costs_no_try_of_those_that_wait_for_a_slot() -> None:
    async def go() -> tuple[list[int], int]:
        backend = Mortal(dies_at=1)
        caller = Caller(backend, Pool(1), Retry(base=0), 0.0)
        timings = [timing for _, timing in await asyncio.gather(*(caller.call(backend.send, ()) for _ in range(5)))]
        return [timing.tries for timing in timings], backend.sent

    tries, sent = asyncio.run(go())
    assert sorted(tries) == [1, 1, 1, 1, 2]
    assert sent == 6


def test_a_server_that_stays_away_frees_the_slots() -> None:
    async def go() -> None:
        backend, pool = Mortal(dies_at=1, back=False), Pool(1)
        caller = Caller(backend, pool, Retry(base=0), 0.0)
        results = await asyncio.gather(*(caller.call(backend.send, ()) for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [GoneError] * 3
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
