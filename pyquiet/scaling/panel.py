"""A question while its chains run, and what became of them."""

import asyncio
from dataclasses import dataclass, field

from pyquiet.scaling.chain import Chain
from pyquiet.scaling.records import Outcome, Question
from pyquiet.scaling.votes import Votes


@dataclass(frozen=True, slots=True)
class ChainResult:
    """How a chain ended: its answer, turns and tokens, its mean score (infinite without any) and its text."""

    number: int
    outcome: Outcome
    answer: str | None
    turns: int
    tokens: int
    mean_score: float
    text: str


@dataclass
class Panel:
    """A question and its chains.

    Attributes:
        index: the question's place in the run. numbers: those of its chains.
        early: whether the rest is cancelled once the winner is certain. last_score: for chains that fill a bank.
    """

    question: Question
    index: int
    numbers: range
    early: bool = False
    phase: str = "run"
    last_score: int | None = None
    results: list[ChainResult] = field(default_factory=list)
    tasks: "set[asyncio.Task[None]]" = field(default_factory=set)
    decided: bool = False
    votes: Votes = field(default_factory=Votes)

    @property
    def complete(self) -> bool:
        """Whether all chains have ended."""
        return len(self.results) == len(self.numbers)

    def take(self, chain: Chain) -> None:
        """Counts a chain that has ended, and cancels the others if they cannot change the winner any more."""
        assert chain.outcome is not None
        ended = (chain.number, chain.outcome, chain.answer, chain.turn, chain.tokens, chain.mean_score, chain.text)
        self.results.append(ChainResult(*ended))
        if self.early and not self.decided:
            if chain.answer is not None:
                self.votes.add(chain.answer, chain.mean_score, chain.number)
            self.decided = self.votes.decided(len(self.numbers) - len(self.results))
            if self.decided:
                for task in self.tasks:
                    task.cancel()
