"""Which of several chains' answers is taken, and how often one, a vote or any of k is right."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pyquiet.checks import check_count
from pyquiet.scaling.answers import equal


@dataclass(frozen=True, slots=True)
class Vote:
    """A chain's answer (None: it has none), its mean score, and, for "first", when it ended."""

    answer: str | None
    score: float
    chain: int
    ended: float = 0.0


@dataclass
class _Party:
    votes: list[Vote] = field(default_factory=list)

    @property
    def name(self) -> str:
        """As its first chain spells it."""
        return str(min(self.votes, key=lambda vote: vote.chain).answer)

    def rank(self, weight: Callable[[Vote], float]) -> tuple[float, float, int]:
        """The lowest wins: most weight, then lowest mean score, then lowest chain."""
        votes = sorted(self.votes, key=lambda vote: vote.chain)  # sums must not depend on who came first
        total, mean = math.fsum(map(weight, votes)), math.fsum(vote.score for vote in votes) / len(votes)
        return -total, mean, votes[0].chain


class Votes:
    """Votes as they come in. Answers are one when `equal` says so."""

    def __init__(self) -> None:
        self._parties = list[_Party]()

    def add(self, answer: str, score: float, chain: int) -> None:
        """A chain's vote; its score is the chain's mean one."""
        self.take(Vote(answer, score, chain))

    def take(self, vote: Vote) -> None:
        """A vote; one without an answer is none."""
        if vote.answer is None:
            return
        party = next((p for p in self._parties if equal(p.name, vote.answer)), None)
        if party is None:
            self._parties.append(party := _Party())
        party.votes.append(vote)

    @property
    def leader(self) -> str | None:
        """The answer with most votes; of several, the one of lowest mean score, then of the lowest chain."""
        return self.winner(lambda vote: 1.0)

    def winner(self, weight: Callable[[Vote], float]) -> str | None:
        """The answer whose votes weigh most, ties as for `leader`; None without a vote."""
        return min(self._parties, key=lambda party: party.rank(weight)).name if self._parties else None

    def decided(self, open_chains: int) -> bool:
        """Whether no votes of chains that have not ended can change the leader: not even a tie could be reached."""
        counts = sorted((len(party.votes) for party in self._parties), reverse=True)
        return bool(counts) and counts[0] > (counts[1] if len(counts) > 1 else 0) + open_chains


def majority(votes: Iterable[Vote]) -> str | None:
    """The most frequent answer, ties as for `Votes.leader`, whatever the order of the votes."""
    return _counted(votes).leader


def weighted(votes: Iterable[Vote], weight: Callable[[Vote], float] | None = None) -> str | None:
    """The answer of most weight: exp(-score) of each vote by default; pass 1 - p where p-values are at hand."""
    return _counted(votes).winner(weight or (lambda vote: math.exp(-vote.score)))


def first(votes: Iterable[Vote]) -> str | None:
    """The answer of the chain that ended first."""
    given = [vote for vote in votes if vote.answer is not None]
    return min(given, key=lambda vote: (vote.ended, vote.chain)).answer if given else None


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that any of k of n samples is right, without bias: 1 - C(n - correct, k) / C(n, k)."""
    check_count("n", n, least=1)
    check_count("k", k, least=1)
    if not 0 <= correct <= n or k > n:
        raise ValueError(f"correct={correct} and k={k} must be at most n={n}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def _counted(votes: Iterable[Vote]) -> Votes:
    counted = Votes()
    for vote in sorted(votes, key=lambda vote: vote.chain):
        counted.take(vote)
    return counted
