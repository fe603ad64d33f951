"""A clock that jumps: runs of engines in the time that their requests would take, without taking it."""

import asyncio
import hashlib
import math
import selectors
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from pyquiet.scaling.backends.base import Backend, Choose, Generate, Generated, Prompt, Score, Scored, TextCodec

T = TypeVar("T")


def run_simulated(main: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on a virtual clock that begins at 0: what sleeps is woken at once, in the right order.

    Only sleeps pass time. Raises RuntimeError if everything waits for something outside.
    """
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        return runner.run(main)


@dataclass(frozen=True)
class Latency:
    """Seconds a request takes: lognormal with mean `mean` and coefficient of variation `cv`, or mean alone at cv 0.

    Attributes:
        per_token: seconds for each token written, added to it.
    """

    mean: float
    cv: float = 0.0
    per_token: float = 0.0

    def seconds(self, seed: int, tokens: int = 0) -> float:
        """The same for the same seed."""
        steady = self.per_token * tokens
        if not self.cv:
            return self.mean + steady
        variance = math.log1p(self.cv**2)
        return self.mean * math.exp(math.sqrt(variance) * _normal(seed) - variance / 2) + steady


class Delayed:
    """A backend that answers as another does, after as long as the latencies say, whoever else is asking."""

    def __init__(self, backend: Backend, generate: Latency, score: Latency | None = None) -> None:
        self.codec: TextCodec | None = backend.codec
        self._backend, self._generate, self._score = backend, generate, score or generate

    @property
    def identity(self) -> dict[str, str]:
        """That of the other."""
        return self._backend.identity

    async def open(self) -> None:
        await self._backend.open()

    async def ready(self) -> None:
        await self._backend.ready()

    async def generate(self, request: Generate) -> Generated:
        text = await self._backend.generate(request)
        await asyncio.sleep(self._generate.seconds(request.seed, text.usage.completion_tokens))
        return text

    async def score(self, request: Score) -> Scored:
        scored = await self._backend.score(request)
        await asyncio.sleep(self._score.seconds(_seed(request.chain, request.prompt)))
        return scored

    async def choose(self, request: Choose) -> Scored:
        chosen = await self._backend.choose(request)
        await asyncio.sleep(self._score.seconds(_seed(request.chain, request.prompt)))
        return chosen

    def forget(self, chain: str) -> None:
        self._backend.forget(chain)

    async def close(self) -> None:
        await self._backend.close()


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.now


class _Jumping(selectors.DefaultSelector):
    """Lets the clock jump by as long as the loop would wait."""

    def __init__(self, loop: _VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("on a virtual clock everything waits for something that no sleep will bring")
        self._loop.now += timeout
        return super().select(0)


def _seed(chain: str, prompt: Prompt) -> int:
    words = repr((chain, prompt.ids, prompt.text))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") >> 1


def _normal(seed: int) -> float:
    """A standard normal number of a seed (Box and Muller), by bits that no draw of tokens uses."""
    words = hashlib.blake2b(f"latency {seed}".encode(), digest_size=16).digest()
    u, v = ((int.from_bytes(half, "big") >> 12) + 0.5 for half in (words[:8], words[8:]))
    return math.sqrt(-2 * math.log(u * 2.0**-52)) * math.cos(2 * math.pi * v * 2.0**-52)
