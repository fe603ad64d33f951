"""Hard caps on takeovers, beside the rate that a rule promises."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, Self

from pyquiet.checks import check_count, check_number, check_word
from pyquiet.scaling.records import TAKEOVERS, Record

WhenEmpty = Literal["wait", "accept"]


@dataclass
class TakeoverLimit:
    """At most so many takeovers of a question, and so many a minute.

    A takeover beyond `per_question` does not happen: the draft is accepted, by a decision whose reason is "forced".
    One beyond `per_minute` waits for its turn (a bucket that holds a minute's worth and fills steadily), or is
    accepted too. What falls to whom depends on the order in which chains come, so transcripts then do as well.
    """

    per_question: int | None = None
    per_minute: float | None = None
    when_empty: WhenEmpty = "wait"
    _taken: Counter[str] = field(default_factory=Counter, init=False, repr=False)
    _tokens: float = field(default=0.0, init=False, repr=False)
    _filled: float | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.per_question is not None:
            check_count("per_question", self.per_question, least=0)
        if self.per_minute is not None:
            check_number("per_minute", self.per_minute)
            if not self.per_minute > 0:
                raise ValueError(f"per_minute must be above 0, got {self.per_minute}; for none use per_question=0")
        check_word("when_empty", self.when_empty, WhenEmpty)

    def fresh(self, done: Iterable[Record] = ()) -> Self:
        """The same cap for a run of its own in the running event loop, with what records of its journal have taken.

        The bucket goes on where it stood when the run was interrupted; the time without a run does not fill it.
        """
        records, mine = list(done), replace(self)
        times = [r.timing.ended for r in records if r.timing is not None]
        for record in records:
            if record.decision is not None and record.decision.action in TAKEOVERS:
                mine._taken[record.key.question] += 1
        if self.per_minute is not None and times:
            mine._tokens, last = self.per_minute, min(times)
            for now in sorted(self._spent(records)):
                mine._tokens, last = _filled(self.per_minute, mine._tokens, now - last) - 1, now
            mine._tokens = _filled(self.per_minute, mine._tokens, max(times) - last)
            mine._filled = asyncio.get_running_loop().time()
        return mine

    def _spent(self, records: Iterable[Record]) -> Iterator[float]:
        """When takeovers took from the bucket, by the run's clock: once they were decided, or were let through."""
        now = 0.0
        for record in records:
            now = now if record.timing is None else max(now, record.timing.ended)
            decided = record.decision is not None and record.decision.action in TAKEOVERS
            if self.when_empty == "accept" and decided:
                yield now
            elif self.when_empty == "wait" and record.stage == "target" and record.timing is not None:
                yield record.timing.queued

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
            try:
                await asyncio.sleep(-self._tokens * 60 / self.per_minute)
            except asyncio.CancelledError:
                self._tokens += 1  # what is not sent takes nothing
                raise

    def _fill(self, per_minute: float) -> None:
        now = asyncio.get_running_loop().time()
        since = float("inf") if self._filled is None else now - self._filled
        self._tokens, self._filled = _filled(per_minute, self._tokens, since), now


def _filled(per_minute: float, tokens: float, seconds: float) -> float:
    return min(per_minute, tokens + seconds * per_minute / 60)
