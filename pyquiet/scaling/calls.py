"""Requests on the wire: slots, who gets one next, and trying again."""

import asyncio
import heapq
import itertools
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from pyquiet.checks import check_count, check_number
from pyquiet.scaling.backends.base import Backend, TransientError
from pyquiet.scaling.records import Timing

T = TypeVar("T")
LONGEST_PAUSE = 60.0  # seconds, whatever a server asks for
Rank = tuple[int, ...]  # the lowest goes first; equal ranks by arrival


class Pool:
    """Slots for one kind of request. Each has a number, and the lowest free one is taken."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._free = list(range(slots))
        self._waiting: list[tuple[Rank, int, asyncio.Future[int]]] = []
        self._arrivals = itertools.count()

    async def acquire(self, rank: Rank = ()) -> int:
        """A slot, once one is free and nobody of lower rank waits."""
        if self._free:
            return heapq.heappop(self._free)
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (rank, next(self._arrivals), future))
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release(future.result())  # given in the same tick in which the waiter was cancelled
            raise

    def release(self, slot: int) -> None:
        """Gives a slot back, or on to the next who waits."""
        while self._waiting:
            future = heapq.heappop(self._waiting)[-1]
            if not future.done():
                future.set_result(slot)
                return
        heapq.heappush(self._free, slot)


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What all of them bring; an error of one cancels the others and, when they have ended, is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


@dataclass(frozen=True)
class Retry:
    """How often a request is sent, and how long is waited between: full jitter below base * 2^tries, at most `cap`.

    Attributes:
        tries: in all, the first one included. base, cap: seconds. deadline: seconds after the first sending beyond
            which none is begun, None for no limit.
    """

    tries: int = 6
    base: float = 0.5
    cap: float = 30.0
    deadline: float | None = None

    def __post_init__(self) -> None:
        check_count("retry.tries", self.tries, least=1)
        for name in ("base", "cap", *(["deadline"] if self.deadline is not None else [])):
            if not check_number(f"retry.{name}", seconds := getattr(self, name)) >= 0:
                raise ValueError(f"retry.{name} must be at least 0 seconds, got {seconds}")

    def pause(self, tries: int, error: TransientError) -> float:
        """Seconds to wait after so many tries; what the server asks for comes first, up to `LONGEST_PAUSE`."""
        if error.retry_after is not None:
            return min(error.retry_after, LONGEST_PAUSE)
        return random.uniform(0, min(self.cap, self.base * 2.0**tries))


class Caller:
    """Sends requests of one kind to one backend, within a pool."""

    def __init__(self, backend: Backend, pool: Pool, retry: Retry, began: float) -> None:
        self.backend, self.pool = backend, pool
        self._retry, self._began = retry, began

    async def call(
        self, send: Callable[[], Awaitable[T]], rank: Rank, lost: Callable[[Timing, BaseException], None]
    ) -> tuple[T, Timing]:
        """What the request brings and how long it took. A slot is held only while it is on the wire.

        If it was sent and brings nothing in the end, `lost` is told of its last try and why.

        Raises TransientError after the last try, and what else `send` raises at once.
        """
        tried: list[Timing] = []
        try:
            return await self._tried(send, rank, tried), tried[-1]
        except BaseException as error:
            if tried:
                lost(tried[-1], error)
            raise

    async def _tried(self, send: Callable[[], Awaitable[T]], rank: Rank, tried: list[Timing]) -> T:
        loop, began = asyncio.get_running_loop(), self._began
        queued = loop.time()
        for tries in itertools.count(1):
            started = None
            await self.backend.ready()
            slot = await self.pool.acquire(rank)
            try:
                await self.backend.ready()  # it may have been lost while this waited for the slot
                started = loop.time()
                return await send()
            except TransientError as error:
                pause = self._retry.pause(tries, error)
                late = self._retry.deadline is not None and loop.time() + pause > queued + self._retry.deadline
                if tries == self._retry.tries or late:
                    raise
            finally:
                if started is not None:
                    tried[:] = [Timing(queued - began, started - began, loop.time() - began, slot, tries)]
                self.pool.release(slot)
            await asyncio.sleep(pause)
        raise AssertionError  # the loop above has no other end
