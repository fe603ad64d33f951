"""A language model that is a hash: what it writes depends on the prompt and the seed alone, in no time."""

import asyncio
import hashlib
import random
from collections.abc import Sequence
from typing import Any

from pyquiet.scaling.backends.base import (
    Choose,
    Encoded,
    Generate,
    Generated,
    Score,
    Scored,
    TransientError,
    Usage,
)


class CharacterCodec:
    """A character is a token."""

    fingerprint = "characters"
    opening: tuple[int, ...] = (1,)
    has_template = False

    def render(self, question: str, system: str | None) -> str:
        return f"{system or ''}{question}\n"

    def encode(self, text: str) -> Encoded:
        return Encoded(tuple(map(ord, text)), tuple((i, i + 1) for i in range(len(text))))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i > 1)


class HashModel:
    """Writes lines of letters, now and then an answer.

    Args:
        answers: chance of an answer in a chunk. wrong: share of requests that fail once or more, at random.
        latency: seconds, a random share of which every request takes. length: letters of a chunk.
    """

    def __init__(
        self, name: str, *, answers: float = 0.2, faults: float = 0.0, latency: float = 0.0, length: int = 12,
        rng: int = 0,
    ) -> None:  # fmt: skip
        self.codec = CharacterCodec()
        self.identity = {"model": name}
        self.requests: list[str] = []
        self.flying = self.peak = 0
        self._name, self._answers, self._faults, self._latency, self._length = name, answers, faults, latency, length
        self._random = random.Random(rng)  # of what must not matter: latencies and failures

    async def open(self) -> None: ...
    async def ready(self) -> None: ...
    async def close(self) -> None: ...
    def forget(self, chain: str) -> None: ...

    async def generate(self, request: Generate) -> Generated:
        await self._travel("generate")
        law = self._law(request.prompt.ids, request.seed)
        text = "".join(law.choices("abcdefgh ", k=law.randint(1, self._length)))
        if law.random() < self._answers:
            text += f"\\boxed{{{law.randint(1, 3)}}}"
        text = text[: request.max_tokens]
        ids = tuple(map(ord, text))
        finish = "eos" if law.random() < 0.05 else "length" if len(text) == request.max_tokens else "stop"
        return Generated(ids, text, finish, Usage(len(request.prompt.ids or ()), 0, len(ids)))

    async def score(self, request: Score) -> Scored:
        await self._travel("score")
        ids = request.prompt.ids
        assert ids is not None
        law = self._law(ids, 0)
        log_probs = tuple(-law.expovariate(1.0) for _ in ids[request.start :])
        return Scored(log_probs, Usage(len(ids), 0, 0))

    async def choose(self, request: Choose) -> Scored:
        await self._travel("choose")
        law = self._law(request.prompt.ids, 1)
        cost = Usage(len(request.prompt.ids or ()), 0, 1)
        return Scored(tuple(-law.expovariate(1.0) for _ in request.options), cost)

    async def _travel(self, kind: str) -> None:
        self.requests.append(kind)
        self.flying += 1
        self.peak = max(self.peak, self.flying)
        try:
            await asyncio.sleep(self._random.random() * self._latency)
            if self._random.random() < self._faults:
                raise TransientError("lost")
        finally:
            self.flying -= 1

    def _law(self, ids: Sequence[int] | None, seed: int) -> random.Random:
        return random.Random(hashlib.blake2b(repr((self._name, ids, seed)).encode()).digest())


class Faulty(HashModel):
    """Fails with an error, if it has one, at its `at`-th request."""

    def __init__(self, name: str, error: Exception | None = None, at: int = 0, **options: Any) -> None:
        super().__init__(name, **options)
        self.error, self.at = error, at

    async def _travel(self, kind: str) -> None:
        number = len(self.requests) + 1
        await super()._travel(kind)
        if self.error is not None and number == self.at:
            raise self.error
