"""A server that was lost: requests to it stop, its health is asked for, and they go on when it is back."""

import asyncio
from collections.abc import Awaitable, Callable

FAILURES = 5


class Circuit:
    """Open after `FAILURES` connections in a row that failed, until `probe` says that the server is well.

    Args:
        probe: asks the server for its health; raises nothing. every: seconds between two probes; one runs at a time.
        changed: called when the circuit has opened or closed.
    """

    def __init__(
        self,
        probe: Callable[[], Awaitable[bool]],
        *,
        every: float,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.closed = True
        self._probe, self._every, self._changed = probe, every, changed
        self._failures = 0
        self._watch: asyncio.Task[None] | None = None

    def succeeded(self) -> None:
        """The server answered, be it with an error."""
        self._failures = 0

    def failed(self) -> None:
        """No connection, or one that broke."""
        self._failures += 1
        if self._failures >= FAILURES:
            self.lose()

    def lose(self) -> None:
        """Opens at once: the server is known to be lost."""
        if self.closed:
            self.closed = False
            self._watch = asyncio.create_task(self._until_well())
            self._changed()

    async def close(self) -> None:
        """Ends the probing."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    async def _until_well(self) -> None:
        while not await self._probe():
            await asyncio.sleep(self._every)
        self._failures, self.closed = 0, True
        self._changed()
