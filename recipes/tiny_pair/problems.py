"""An arithmetic word problem and its solution, one step a line.

Two problems with the same `equations` are the same sum in other words, so those tell what was held out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}


@dataclass(frozen=True)
class Step:
    """One line of a solution; `shown` stands for the true result where the line is wrong."""

    words: str
    left: int
    sign: str
    right: int
    shown: int | None = None

    @property
    def result(self) -> int:
        return OPERATIONS[self.sign](self.left, self.right) if self.shown is None else self.shown

    @property
    def equation(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}"

    @property
    def line(self) -> str:
        return f"{self.words}: {self.equation}.\n"

    @property
    def correction(self) -> str:
        return f"Wait, {self.equation}.\n"


@dataclass(frozen=True)
class Problem:
    """A question and the steps to its answer; before a solution the question stands with a line break behind it."""

    question: str
    steps: tuple[Step, ...]

    @property
    def answer(self) -> int:
        return self.steps[-1].result

    @property
    def equations(self) -> tuple[str, ...]:
        return tuple(step.equation for step in self.steps)

    @property
    def lines(self) -> list[str]:
        return [*(step.line for step in self.steps), answer_line(self.answer)]


def answer_line(answer: int) -> str:
    return f"The answer is \\boxed{{{answer}}}.\n"
