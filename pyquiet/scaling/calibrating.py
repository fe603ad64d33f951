"""How `ATTS.calibrate` fills a bank: which questions and chains calibrate which turn, and what was scored so far."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pyquiet.checks import check_count, check_word
from pyquiet.scaling.calibration import BUCKETS, Hierarchical, Kind, PerTurn, Pooled, fit
from pyquiet.scaling.cells import Cell
from pyquiet.scaling.panel import Panel
from pyquiet.scaling.records import Question, Record
from pyquiet.scaling.spent import Spent
from pyquiet.scaling.table import Table


class Filling:
    """A bank that is being filled, a turn after the other, each by its own share of the questions: every T-th.

    Args:
        longest: turns that a chain may have; the others are those of `ATTS.calibrate`.

    Attributes:
        calibrator: made of what was scored up to the last `fit`; None before there is any.
        table: of all records. made: what tells one filling from another in a journal, as JSON values.
    """

    def __init__(
        self, questions: Sequence[Question], kind: Kind, *, chains: int, turns: int | None, n_min: int, longest: int
    ) -> None:
        check_word("kind", kind, Kind)
        check_count("chains", chains, least=1)
        check_count("n_min", n_min, least=1)
        if turns is not None and kind != "per_turn":
            raise ValueError(f'turns goes with kind="per_turn", got turns={turns} with {kind!r}')
        wanted = check_count("turns", longest if turns is None else turns, least=1)
        self.questions, self.turns = questions, range(min(wanted, longest) if kind == "per_turn" else 1)
        self.made: dict[str, Any] = {"kind": kind, "chains": chains, "n_min": n_min}
        self.made |= {} if turns is None else {"turns": turns}
        self.calibrator: Pooled | Hierarchical | PerTurn | None = None
        self.table = Table()
        self._buckets = BUCKETS if turns is None else range(turns + 1)
        self._chains, self._known = chains, {question.id: question for question in questions}
        self._scores: list[tuple[float, Cell]] = []
        self._fitted = 0  # of the scores

    def panels(self, turn: int) -> Iterator[Panel]:
        """The questions that calibrate a turn, with chains of their own."""
        numbers = range(turn * self._chains, (turn + 1) * self._chains)
        for place, question in enumerate(self._share(turn)):
            yield Panel(question, place, numbers, phase="calibrate", last_score=turn)

    def filed(self, turn: int, records: Iterable[Record]) -> list[Record]:
        """Those of the questions that calibrate a turn."""
        mine = {question.id for question in self._share(turn)}
        return [record for record in records if record.key.question in mine]

    def add(self, record: Record) -> None:
        """Takes in a record that was committed."""
        self.table.add(record)
        key, score, reason = record.key, record.score, "" if record.decision is None else record.decision.reason
        if key.phase == "calibrate" and reason == "calibration" and score is not None:
            self._scores.append((score, Cell.of(self._known[key.question], key.turn)))

    def fit(self) -> None:
        """Makes the calibrator anew of all scores, if there are more of them now."""
        if len(self._scores) > self._fitted:
            kind, n_min = self.made["kind"], self.made["n_min"]
            self.calibrator = fit(kind, self._scores, buckets=self._buckets, n_min=n_min, chains=self._chains)
            self._fitted = len(self._scores)

    def filled(self) -> Pooled | Hierarchical | PerTurn:
        """The calibrator, with what it took; ValueError where nothing could be scored."""
        if self.calibrator is None:
            raise ValueError("questions: none of the drafts could be scored (too short?), so there is no bank")
        self.calibrator.spent = Spent.of(self.table)
        return self.calibrator

    def _share(self, turn: int) -> Sequence[Question]:
        return self.questions[turn :: len(self.turns)]
