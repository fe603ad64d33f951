"""A run of chains on the terminal: rate by turn, answers that are right, and what it took."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from pyquiet.scaling.records import Record

_TURNS = 8  # rows that are shown


@contextmanager
def watching(
    title: str, chains: int, rate: float, answers: Mapping[str, str], *, quiet: bool
) -> "Iterator[Callable[[Record], None]]":
    """Gives an `on_record` that keeps a table on the terminal up to date until the block ends.

    Args:
        chains: how many there will be. rate: what is promised. answers: right answers by the questions' ids.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda record: None
        return
    from rich.console import Console
    from rich.live import Live

    board = _Board(title, chains, rate, answers)
    with Live(console=Console(stderr=True), get_renderable=board.table, refresh_per_second=4, transient=True):
        yield board.take


class _Board:
    def __init__(self, title: str, chains: int, rate: float, answers: Mapping[str, str]) -> None:
        self.title, self.chains, self.rate, self.answers = title, chains, rate, answers
        self.began = time.monotonic()
        self.decided: Counter[int] = Counter()
        self.taken: Counter[int] = Counter()
        self.tokens: Counter[str] = Counter()
        self.ended = self.right = self.graded = 0

    def take(self, record: "Record") -> None:
        from pyquiet.scaling.answers import equal

        key, decision = record.key, record.decision
        self.tokens[key.stage] += record.usage.completion_tokens
        # A rate is promised for first drafts, and nothing was decided on those that fill a bank.
        if decision is not None and decision.reason != "calibration" and not key.attempt:
            self.decided[key.turn] += 1
            self.taken[key.turn] += decision.action != "accept"
        if key.stage == "end" and key.phase != "presample":
            self.ended += 1
            right = self.answers.get(key.question)
            if right is not None:
                self.graded += 1
                self.right += record.answer is not None and equal(record.answer, right)

    def table(self) -> "Table":
        from rich.table import Table

        table = Table(title=f"{self.title}: {self.ended} of {self.chains} chains", title_justify="left")
        for name in ("turn", "decisions", f"takeovers (promised {self.rate:.0%})"):
            table.add_column(name, justify="right")
        for turn in sorted(self.decided)[:_TURNS]:
            table.add_row(str(turn), str(self.decided[turn]), f"{self.taken[turn] / self.decided[turn]:.1%}")
        table.caption = ", ".join(self._facts())
        return table

    def _facts(self) -> Iterator[Any]:
        if self.graded:
            yield f"{self.right / self.graded:.1%} of chains right"
        yield f"tokens: {self.tokens['draft']:,} drafted, {self.tokens['target']:,} by the target"
        yield f"{time.monotonic() - self.began:.0f} s"
