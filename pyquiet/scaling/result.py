"""What a run gives back."""

from collections.abc import Mapping
from dataclasses import dataclass

from pyquiet.scaling.figures import Drift
from pyquiet.scaling.panel import ChainResult
from pyquiet.scaling.records import Question, Record
from pyquiet.scaling.report import Report


@dataclass(frozen=True)
class QuestionResult:
    """What became of a question: the answer that was selected (None: no chain has one), and its chains in order."""

    question: Question
    answer: str | None
    chains: tuple[ChainResult, ...]


@dataclass(frozen=True)
class ATTSResult:
    """Questions in the order they were asked, what the run cost, and what was promised.

    Attributes:
        guaranteed: for each turn that was decided on, whether the promised rate holds there exactly, and why. Not where
            scores have drifted.
        finished: False after an interruption; the journal then resumes the run.
    """

    questions: tuple[QuestionResult, ...]
    report: Report
    guaranteed: Mapping[int, tuple[bool, str]]
    finished: bool = True

    @property
    def answers(self) -> dict[str, str | None]:
        """The selected answers by the questions' ids."""
        return {result.question.id: result.answer for result in self.questions}


class Promises:
    """Which turns the promise holds for."""

    def __init__(self) -> None:
        self._turns: dict[int, tuple[bool, str]] = {}

    def add(self, record: Record) -> None:
        if record.key.phase != "run" or record.decision is None or record.key.attempt:
            return
        decision, turn = record.decision, record.key.turn
        if self._turns.get(turn, (True, ""))[0]:
            self._turns[turn] = (decision.guaranteed, decision.why or f"decided otherwise: {decision.reason}")

    def by_turn(self, drift: Mapping[int, Drift]) -> dict[int, tuple[bool, str]]:
        broken = {turn: (False, str(watch.alarm)) for turn, watch in drift.items() if watch.alarm is not None}
        return dict(sorted((self._turns | broken).items()))
