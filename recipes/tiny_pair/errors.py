"""Solutions with wrong lines, each of which the next line corrects."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from problems import OPERATIONS, Problem, Step, answer_line


@dataclass(frozen=True)
class Line:
    """A line of a text to train on; a wrong one is to be read but not to be learned."""

    text: str
    wrong: bool = False


def with_errors(problem: Problem, rng: random.Random, count: int) -> list[Line]:
    """The solution with `count` wrong lines, each followed by one that corrects it; the answer is right."""
    places = sorted(rng.choices(range(len(problem.steps) + 1), k=count))
    lines = []
    for number, text in enumerate(problem.lines):
        for attempt in range(places.count(number)):
            lines.append(Line(_wrong(problem, number, rng, again=attempt > 0), wrong=True))
        corrected = _correction(problem, number) if number in places else text
        lines.append(Line(corrected))
    return lines


def _correction(problem: Problem, number: int) -> str:
    if number < len(problem.steps):
        return problem.steps[number].correction
    return _corrected_answer(problem.answer)


def _corrected_answer(answer: int) -> str:
    return "Wait, the" + answer_line(answer).removeprefix("The")


def _wrong(problem: Problem, number: int, rng: random.Random, *, again: bool) -> str:
    """A wrong version of a line, or of its correction when that is tried `again`."""
    if number == len(problem.steps):
        other = rng.choice(sorted({problem.answer + 1, *(step.result for step in problem.steps)} - {problem.answer}))
        return _corrected_answer(other) if again else answer_line(other)
    step = problem.steps[number]
    wrong = step
    while wrong.equation == step.equation or not 0 <= wrong.result <= 999:
        wrong = rng.choices((_slip, _operation, _quantity, _skip), (5, 1, 3, 1))[0](problem, number, rng)
    return wrong.correction if again else wrong.line


def _slip(problem: Problem, number: int, rng: random.Random) -> Step:
    """A result that is off by a little, or in a digit."""
    step = problem.steps[number]
    off = rng.choice((1, 1, 2, 10, 10, rng.randint(1, 9), 10 * rng.randint(1, 9)))
    return replace(step, shown=step.result + rng.choice((-1, 1)) * off)


def _operation(problem: Problem, number: int, rng: random.Random) -> Step:
    step = problem.steps[number]
    return replace(step, sign=rng.choice([s for s in OPERATIONS if s != "/" or step.left % step.right == 0]))


def _quantity(problem: Problem, number: int, rng: random.Random) -> Step:
    """Another number of the problem in the place of a right one."""
    step, before = problem.steps[number], problem.steps[: number + 2]
    other = rng.choice([value for s in before for value in (s.left, s.right)])
    wrong = replace(step, left=other) if rng.random() < 0.5 else replace(step, right=other)
    return wrong if wrong.sign != "/" or wrong.left % wrong.right == 0 else step


def _skip(problem: Problem, number: int, rng: random.Random) -> Step:
    """The next step, made too early."""
    step, after = problem.steps[number], problem.steps[number + 1 : number + 2]
    if not after or after[0].left != step.result or after[0].sign == "/":
        return step
    return replace(after[0], left=step.left)
