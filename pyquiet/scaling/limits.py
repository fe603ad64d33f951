"""Hard caps on takeovers, beside the rate that a rule promises."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from pyquiet.checks import check_count


@dataclass
class TakeoverLimit:
    """At most so many takeovers of a question, and so many a minute.

    A takeover beyond `per_question` does not happen: the draft is accepted, by a decision whose reason is "forced".
    One beyond `per_minute` waits for its turn (a bucket that holds a minute's worth and fills steadily), or is
    accepted too. What falls to whom depends on the order in which chains come, so transcripts then do as well.
    """

    per_question: int | None = None
    per_minute: float | None = None
    when_empty: Literal["wait", "accept"] = "wait"
    _taken: Counter[str] = field(default_factory=Counter, init=False, repr=False)
    _tokens: float = field(default=0.0, init=False, repr=False)
    _filled: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.per_question is not None:
            check_count("per_question", self.per_question, least=0)
        if self.per_minute is not None and self.per_minute <= 0:
            raise ValueError(f"per_minute must be above 0, got {self.per_minute}; for none use per_question=0")
        if self.when_empty not in ("wait", "accept"):
            raise ValueError(f'when_empty must be "wait" or "accept", got {self.when_empty!r}')

    def take(self, question: str) -> bool:
        """Counts a takeover of the question; False if it must not happen."""
        if self.per_question is not None and self._taken[question] >= self.per_question:
            return False
        if self.per_minute is not None and self.when_empty == "accept":
            self._fill(self.per_minute)
            if self._tokens < 1:
                return False
            self._tokens -= 1
        self._taken[question] += 1
        return True

    async def wait(self) -> None:
        """Returns when the next takeover may be sent."""
        if self.per_minute is None or self.when_empty == "accept":
            return
        self._fill(self.per_minute)
        self._tokens -= 1  # below 0: the place in the queue
        if self._tokens < 0:
            await asyncio.sleep(-self._tokens * 60 / self.per_minute)

    def _fill(self, per_minute: float) -> None:
        now = asyncio.get_running_loop().time()
        since = float("inf") if self._filled is None else now - self._filled
        self._tokens, self._filled = min(per_minute, self._tokens + since * per_minute / 60), now
