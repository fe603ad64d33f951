"""One chain as a state machine: what it needs next, and what a committed record does to it. It asks nobody anything.

A turn is a draft, its score with a decision, and, where the target takes over, the target's text. Whoever drives
chains gets the next step from `step` and hands its record to `apply`; replaying a journal is the same without a model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pyquiet.scaling.backends.base import Generate, Generated, Prompt
from pyquiet.scaling.plan import Plan, Sampling
from pyquiet.scaling.records import Key, Outcome, Question, Record, Stage
from pyquiet.scaling.views import Views

Extract = Callable[[str], str | None]
Role = Literal["draft", "target"]


@dataclass(frozen=True, slots=True)
class Step:
    """What a chain needs next: a request to generate, or (request None) its chunk scored and judged."""

    key: Key
    seed: int
    request: Generate | None = None


@dataclass(frozen=True, slots=True)
class _Attempt:
    chunk: Generated
    score: float | None
    discarded: bool = False


class Chain:
    """Chain number `number` of a question.

    Args:
        extract: finds an answer, which ends the chain. final: finds one, where there is none, when the chain has ended
            otherwise; it may look for words that a chunk can be cut off behind.
        last_score: the turn whose score ends the chain, for chains that fill a calibration bank.
    """

    def __init__(
        self,
        question: Question,
        number: int,
        plan: Plan,
        views: Views,
        extract: Extract,
        *,
        final: Extract | None = None,
        phase: str = "run",
        last_score: int | None = None,
    ) -> None:
        self.question, self.number, self.phase = question, number, phase
        self.turn = self.tokens = 0
        self.outcome: Outcome | None = None
        self.answer: str | None = None
        self.score_sum, self.scores = 0.0, 0  # of the chunks that were scored, kept or not
        self._plan, self._views, self._extract = plan, views, extract
        self._final, self._last_score = final or extract, last_score
        self._stage: Stage = "draft"
        self._attempts: list[_Attempt] = []

    @property
    def name(self) -> str:
        """Names the chain among all of a run."""
        return f"{self.phase}/{self.question.id}/{self.number}"

    @property
    def text(self) -> str:
        """What it has written so far, rejected chunks that were replaced left out."""
        return self._views.text

    @property
    def mean_score(self) -> float:
        """Mean of its scores, infinite without any."""
        return self.score_sum / self.scores if self.scores else float("inf")

    @property
    def chunk(self) -> Generated:
        """The draft that waits for its decision."""
        return self._attempts[-1].chunk

    def chunk_prompt(self) -> tuple[Prompt, int]:
        """What the target reads to score the chunk, and where the chunk begins in it."""
        return self._views.with_chunk(self.chunk)

    @property
    def calibrates(self) -> bool:
        """Whether its next score goes into a bank, and nothing comes after it."""
        return self.turn == self._last_score

    def end(self, outcome: Outcome) -> None:
        """Stops it where it is."""
        self.outcome = outcome

    def key(self, stage: Stage) -> Key:
        """The key of a stage of this turn; a chain's end has one key, whenever it comes."""
        if stage == "end":
            return Key(self.phase, self.question.id, self.number, 0, "end")
        attempt = len(self._attempts) - (stage != "draft") if stage in ("draft", "score") else 0
        return Key(self.phase, self.question.id, self.number, self.turn, stage, attempt)

    def step(self) -> Step | None:
        """What the chain needs now; None when it has ended but for its end record, or altogether."""
        if self.outcome is not None:
            return None
        key = self.key(self._stage)
        seed = key.seed(self._plan.seed)
        if self._stage == "score":
            return Step(key, seed)
        return Step(key, seed, self._request("draft" if self._stage == "draft" else "target", seed))

    def apply(self, record: Record) -> None:
        """Goes on by a record of the current stage, or ends by an end record."""
        if record.key.stage == "end":
            self.outcome, self.answer = record.outcome, record.answer
            return
        if record.key != self.key(self._stage):
            raise ValueError(f"chain {self.name} is at {self.key(self._stage)}, not at {record.key}")
        if record.key.stage == "score":
            self._judged(record)
        else:
            self._written(record)

    def _request(self, role: Role, seed: int) -> Generate:
        sampling: Sampling = getattr(self._plan, role)
        tokens = sampling.tokens
        if self._plan.chain_tokens is not None:
            tokens = min(tokens, self._plan.chain_tokens - self.tokens)
        return Generate(
            self.name, self._views.prompt(role), tokens, sampling.temperature, sampling.top_p, seed, self._plan.stop,
            sampling.top_k,
        )  # fmt: skip

    def _written(self, record: Record) -> None:
        text = Generated(record.ids, record.text, record.finish, record.usage)  # type: ignore[arg-type]
        self.tokens += record.usage.completion_tokens
        if record.key.stage == "draft":
            self._attempts.append(_Attempt(text, None))
            self._stage = "score"
        else:
            self._views.append(text, "target")
            self._end_turn(text)

    def _judged(self, record: Record) -> None:
        assert record.decision is not None
        chunk, action = self.chunk, record.decision.action
        if record.score is not None:
            self.score_sum, self.scores = self.score_sum + record.score, self.scores + 1
        discarded = record.decision.reason == "discard"
        self._attempts[-1] = _Attempt(chunk, record.score, discarded)
        if self.calibrates:
            self.outcome = "turns"
        elif action == "resample" and not self._spent():
            self._stage = "draft"
        elif action in ("accept", "resample"):
            if record.decision.reason == "resampled":
                chunk = self._best()
            if not discarded:  # or else the budget is spent: nothing is left to draft another one with
                self._views.append(chunk, "draft")
            self._end_turn(chunk)
        else:
            if action == "continue" and not self._finished(chunk):
                self._views.append(chunk, "draft")
            self._stage = "target"
            if self._spent():
                self._end_turn(chunk)

    def _best(self) -> Generated:
        """The chunk with the best score of the turn's drafts that were not thrown away."""
        kept = [attempt for attempt in self._attempts if not attempt.discarded]
        return min(kept, key=lambda a: float("inf") if a.score is None else a.score).chunk

    def _finished(self, chunk: Generated) -> bool:
        """Whether nothing sensible could stand behind a chunk that the target was called for."""
        if self._plan.answer_from_rejected:
            return False
        return chunk.finish == "eos" or self._extract(self.text + chunk.text) is not None

    def _spent(self) -> bool:
        return self._plan.chain_tokens is not None and self.tokens >= self._plan.chain_tokens

    def _end_turn(self, last: Generated) -> None:
        """The turn's text stands: the chain ends, or the next turn begins."""
        self.answer = self._extract(self.text)
        self.turn, self._stage, self._attempts = self.turn + 1, "draft", []
        if self.answer is not None:
            self.outcome = "answer"
        elif last.finish == "eos":
            self.outcome = "eos"
        elif self.turn == self._plan.turns:
            self.outcome = "turns"
        elif self._spent():
            self.outcome = "tokens"
        elif self.turn == self._plan.turns - 1 and self._plan.closing_cue:
            self._views.append(Generated(None, self._plan.closing_cue, "stop", last.usage), "draft")
        if self.outcome is not None and self.answer is None:
            self.answer = self._final(self.text)
