"""Servers of the same model: which one a chain is sent to, and what happens when some or all are lost."""

import asyncio
from collections import Counter
from collections.abc import Sequence

from pyquiet.scaling.backends.base import GoneError, TransientError
from pyquiet.scaling.backends.wire import Endpoint


class Replicas:
    """A chain stays where its prefix is cached; a new one, or one whose server is lost, goes where least is to do.

    Args:
        give_up_s: seconds without any server after which `ready` raises GoneError.
    """

    def __init__(self, members: Sequence[Endpoint], *, give_up_s: float) -> None:
        self.members = tuple(members)
        self._give_up_s = give_up_s
        self._homes: dict[str, Endpoint] = {}
        self._chains: Counter[int] = Counter()
        self._up = asyncio.Event()
        self._up.set()
        self._deadline = 0.0

    def pick(self, chain: str) -> Endpoint:
        """The chain's server; TransientError if all are lost, so that the caller waits in `ready`."""
        home = self._homes.get(chain)
        if home is None or not home.circuit.closed:
            alive = [m for m in self.members if m.circuit.closed]
            if not alive:
                raise TransientError("all servers are lost; nothing is sent until one is back", retry_after=0.0)
            self.forget(chain)
            home = min(alive, key=lambda m: (m.outstanding, self._chains[id(m)]))
            self._homes[chain] = home
            self._chains[id(home)] += 1
        return home

    def forget(self, chain: str) -> None:
        """The chain is at no server any more."""
        home = self._homes.pop(chain, None)
        if home is not None:
            self._chains[id(home)] -= 1

    def changed(self) -> None:
        """A circuit has opened or closed."""
        if any(m.circuit.closed for m in self.members):
            self._up.set()
        else:
            self._up.clear()
            self._deadline = asyncio.get_running_loop().time() + self._give_up_s

    async def ready(self) -> None:
        """Returns when there is a server to send to; GoneError if there was none for `give_up_s`."""
        if self._up.is_set():
            return
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._up.wait()
        except TimeoutError:
            why = "; ".join(f"{m.url}: {m.trouble}" for m in self.members)
            raise GoneError(f"no server for {self._give_up_s:g} s; start it again and resume ({why})") from None
