"""Where scores come from, and which questions a bank is made of."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from pyquiet.scaling.conformal import Bank, check_bank
from pyquiet.scaling.records import Question

_BETWEEN = "\t"  # group and question, in a bank


@dataclass(frozen=True, slots=True)
class Cell:
    """Where a score comes from: question (a hash of its text, since ids may be mere places in a list), group, turn."""

    question: str
    group: str
    turn: int

    @classmethod
    def of(cls, question: Question, turn: int = 0) -> "Cell":
        """The cell of a question's turn."""
        return cls(_hash(question.text), question.group, turn)

    @property
    def name(self) -> str:
        """What the question is called in banks."""
        return f"{self.group}{_BETWEEN}{self.question}" if self.group else self.question


class Members:
    """The questions that banks are made of."""

    def __init__(self, banks: Iterable[Bank]) -> None:
        self._names = frozenset(name for bank in banks for name in check_bank(bank).groups)
        self._groups = {name.rpartition(_BETWEEN)[0] for name in self._names}

    def __contains__(self, cell: Cell) -> bool:
        return cell.name in self._names

    def why_not(self, cell: Cell) -> str:
        """Why the question is no new one of the bank's kind; empty if it may be one."""
        if cell.group not in self._groups:
            return f"the bank holds no scores of group {cell.group!r}"
        return "the question is in the bank, which holds for new ones" if cell in self else ""


@lru_cache(maxsize=4096)
def _hash(text: str) -> str:
    words = " ".join(text.split())
    return hashlib.blake2b(words.encode(errors="surrogatepass"), digest_size=8).hexdigest()
