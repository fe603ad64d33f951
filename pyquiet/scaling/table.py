"""Records of a run as rows of one compact table: some hundred bytes each, without texts and token ids."""

import struct
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyquiet.scaling.records import Record

STAGES = ("draft", "score", "target", "end")
ACTIONS = ("accept", "continue", "replace", "resample")
ACCEPT, DISCARD = ACTIONS.index("accept"), ACTIONS.index("resample")
_FIELDS = {
    **dict.fromkeys(("phase", "question", "chain", "turn", "stage", "attempt"), "i"),
    **dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens"), "i"),
    **dict.fromkeys(("queued", "started", "ended"), "d"),
    **dict.fromkeys(("slot", "tries"), "i"),  # slot -1: no request was made
    "lost": "?",  # nothing came of the request for the stage
    **dict.fromkeys(("score", "p"), "d"),  # nan: there is none
    **dict.fromkeys(("action", "reason", "n", "version"), "i"),  # action -1: nothing was decided
    **dict.fromkeys(("guaranteed", "near_tie"), "?"),
    "watched": "d",  # nan: no monitor was shown it
    **dict.fromkeys(("outcome", "answer"), "i"),  # -1: there is none
}
_ROW = struct.Struct("=" + "".join(_FIELDS.values()))
_DTYPE = np.dtype(list(_FIELDS.items()))
_NAN = float("nan")
_NO_TIME = (0.0, 0.0, 0.0, -1, 0)
_UNDECIDED = (_NAN, -1, -1, 0, -1, False, False, _NAN)


class Names:
    """Numbers for texts, from 0 on by first appearance; -1 for None."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, name: str | None) -> int:
        """The name's number, a new one where it is seen for the first time."""
        return -1 if name is None else self._numbers.setdefault(name, len(self._numbers))

    def __getitem__(self, number: int) -> str:
        return self.all[number]

    @property
    def all(self) -> list[str]:
        """The names by their numbers."""
        return list(self._numbers)


class Table:
    """Rows of records in the order in which they were added."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._bytes = bytearray()
        self.phases, self.questions, self.answers = Names(), Names(), Names()
        self.reasons, self.versions, self.outcomes = Names(), Names(), Names()
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Takes in a record."""
        key, usage, time, decided = record.key, record.usage, record.timing, record.decision
        self._bytes += _ROW.pack(
            self.phases.number(key.phase),
            self.questions.number(key.question),
            key.chain,
            key.turn,
            STAGES.index(record.stage),
            key.attempt,
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            *(_NO_TIME if time is None else (time.queued, time.started, time.ended, time.slot, time.tries)),
            key.stage == "lost",
            _NAN if record.score is None else record.score,
            *(
                _UNDECIDED
                if decided is None
                else (
                    _NAN if decided.p is None else decided.p,
                    ACTIONS.index(decided.action),
                    self.reasons.number(decided.reason),
                    decided.n,
                    self.versions.number(decided.version),
                    decided.guaranteed,
                    decided.near_tie,
                    _NAN if decided.watched is None else decided.watched,
                )
            ),
            self.outcomes.number(record.outcome),
            self.answers.number(record.answer),
        )

    def rows(self) -> "Rows":
        """All rows, as a view: no record can be added while it is held."""
        values = np.frombuffer(self._bytes, _DTYPE)
        return Rows(values, np.arange(len(values)))


class Rows:
    """Some rows of a table."""

    def __init__(self, values: NDArray[Any], index: NDArray[np.int64]) -> None:
        self._values, self._index = values, index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, column: str) -> NDArray[Any]:
        """A column of these rows."""
        return np.asarray(self._values[column][self._index])

    def where(self, chosen: NDArray[Any]) -> "Rows":
        """Those that a mask or places choose."""
        return Rows(self._values, self._index[chosen])

    def stage(self, name: str) -> "Rows":
        """Those of a stage."""
        return self.where(self["stage"] == STAGES.index(name))

    @property
    def timed(self) -> "Rows":
        """Those of requests."""
        return self.where(self["slot"] >= 0)

    @property
    def first_decisions(self) -> "Rows":
        """The decisions on first drafts: those that a rate is promised for."""
        return self.where((self["action"] >= 0) & (self["attempt"] == 0))

    @property
    def taken(self) -> NDArray[np.bool_]:
        """Which of the decisions were not to accept."""
        return np.asarray(self["action"] != ACCEPT)

    def groups(self, *columns: str) -> NDArray[np.int64]:
        """A number for each row, from 0 on, the same for rows that agree in these columns; by first appearance."""
        number = np.zeros(len(self), dtype=np.int64)
        for column in columns:
            values, place = np.unique(self[column], return_inverse=True)
            number = np.unique(number * len(values) + place, return_inverse=True)[1]
        _, first = np.unique(number, return_index=True)
        return np.asarray(np.argsort(np.argsort(first))[number]) if len(self) else number

    def split(self, *columns: str) -> "Iterator[Rows]":
        """The rows of each such group."""
        number = self.groups(*columns)
        order = np.argsort(number, kind="stable")
        ends = np.cumsum(np.bincount(number))
        for part in np.split(order, ends[:-1]) if len(self) else ():
            yield self.where(part)
