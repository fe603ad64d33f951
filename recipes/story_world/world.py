"""A world of short stories in plain English whose questions have one answer.

A story gives facts, then says what follows from them. Each conclusion stands in one of two forms:

    A letter from Tom, passed on three times, came to Lucy.
    A letter from Tom, passed on three times, came to-- Jane Anne-- Lucy.

at once, or with the steps that lead to it between dashes. There are three kinds of stories: who writes to whom (chains
of a relation), who took what where (a state that changes), and how many are left (sums).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

NAMES = ("Tom", "Jane", "John", "Emma", "Anne", "Oliver", "Lucy", "Joe")
OBJECTS = ("book", "letter", "hat", "gold")
PLACES = ("garden", "house", "wood", "town", "ship")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
TIMES = ("", "once", "twice", "three times", "four times")


class Part(Enum):
    """What a piece of a story is."""

    FACT = "fact"
    QUESTION = "question"  # the words of a conclusion up to its answer
    STEPS = "steps"
    ANSWER = "answer"


@dataclass(frozen=True)
class Piece:
    """A run of words; all but a story's first begin with a space, a full stop or a dash."""

    text: str
    part: Part = Part.FACT
    depth: int = 0  # of an answer: steps that lead to it


Story = list[Piece]


def conclusion(question: str, steps: Sequence[str], answer: str, end: str, *, written: bool) -> Story:
    """A sentence that ends in its answer, with the steps between dashes where `written`."""
    shown = [Piece(f"-- {' '.join(steps)}--", Part.STEPS)] if written and steps else []
    return [
        Piece(question, Part.QUESTION),
        *shown,
        Piece(f" {answer}", Part.ANSWER, len(steps) + 1),
        Piece(end, Part.QUESTION),
    ]


@dataclass(frozen=True)
class Wishes:
    """What the conclusions of a story should be like."""

    shallow: float = 0.5  # share of conclusions of one step
    written: float = 0.5  # share of the others that write their steps out


def letters(rng: np.random.Generator, wishes: Wishes) -> Story:
    """Three to six friends write to each other in a ring; letters are passed on along it."""
    people = [str(name) for name in rng.permutation(NAMES)[: rng.integers(3, 7)]]
    writes_to = dict(zip(people, people[1:] + people[:1], strict=True))
    facts = " ".join(f"{a} wrote to {writes_to[a]}." for a in rng.permutation(people))
    story: Story = [Piece(f"There were {NUMBERS[len(people)]} friends. {facts}")]
    for _ in range(4):
        depth = 1 if rng.random() < wishes.shallow else int(rng.integers(2, min(5, len(people))))
        first = people[rng.integers(len(people))]
        chain = [writes_to[first]]
        while len(chain) < depth:
            chain.append(writes_to[chain[-1]])
        question = f" A letter from {first}, passed on {TIMES[depth]}, came to"
        story += conclusion(question, chain[:-1], chain[-1], ".", written=rng.random() < wishes.written)
    return story


def journeys(rng: np.random.Generator, wishes: Wishes) -> Story:
    """Three people take things, go places and send things to each other."""
    people, things = rng.permutation(NAMES)[:3], rng.permutation(OBJECTS)[:3]
    place = {p: str(rng.choice(PLACES)) for p in people}
    holder = {t: str(rng.choice(people)) for t in things}
    facts = [f"{p} went to the {place[p]}." for p in people] + [f"{holder[t]} took the {t}." for t in things]
    for _ in range(int(rng.integers(1, 4))):
        who = str(rng.choice(people))
        theirs = [t for t in things if holder[t] == who]
        if theirs and rng.random() < 0.5:
            thing, other = theirs[rng.integers(len(theirs))], str(rng.choice([p for p in people if p != who]))
            holder[thing] = other
            facts.append(f"{who} sent the {thing} to {other}.")
        else:
            place[who] = str(rng.choice([p for p in PLACES if p != place[who]]))
            facts.append(f"{who} went to the {place[who]}.")
    story: Story = [Piece(f"One morning three friends set out. {' '.join(facts)}")]
    for thing in things:
        if rng.random() < wishes.shallow:
            story += conclusion(f" The {thing} was now with", [], holder[thing], ".", written=False)
        else:
            question, where = f" The {thing} was now in the", place[holder[thing]]
            story += conclusion(question, [holder[thing]], where, ".", written=rng.random() < wishes.written)
    return story


def sums(rng: np.random.Generator, wishes: Wishes) -> Story:
    """Someone has some things, gets more and gives some away."""
    who, thing = str(rng.choice(NAMES)), str(rng.choice(OBJECTS[:3]))
    story: Story = [Piece("It was a long day.")]
    for _ in range(3):
        count = int(rng.integers(1, 5))
        facts = [f"{who} had {counted(count, thing)}."]
        steps: list[str] = []
        depth = 1 if rng.random() < wishes.shallow else int(rng.integers(2, 5))
        for _ in range(depth):
            change = int(rng.choice([c for c in (-3, -2, -1, 1, 2, 3) if 1 <= count + c <= 6]))
            verb = rng.choice(("found", "got") if change > 0 else ("lost", "gave away"))
            facts.append(f"{who} {verb} {NUMBERS[abs(change)]}.")
            count += change
            steps.append(NUMBERS[count])
        story.append(Piece(f" {' '.join(facts)}"))
        story += conclusion(
            f" Then {who} had",
            steps[:-1],
            steps[-1],
            f" {thing}{'s' * (count > 1)}.",
            written=rng.random() < wishes.written,
        )
    return story


def counted(count: int, thing: str) -> str:
    return f"{NUMBERS[count]} {thing}{'s' * (count > 1)}"


KINDS: dict[str, Callable[[np.random.Generator, Wishes], Story]] = {
    "letters": letters, "journeys": journeys, "sums": sums
}  # fmt: skip


def draw_story(rng: np.random.Generator, wishes: Wishes, kind: str | None = None) -> Story:
    """A random story, of a random kind unless one is named."""
    return KINDS[kind or str(rng.choice(list(KINDS)))](rng, wishes)


def text_of(story: Story) -> str:
    return "".join(piece.text for piece in story)


if __name__ == "__main__":
    for seed, kind in enumerate(KINDS):
        print(text_of(draw_story(np.random.default_rng(seed), Wishes(), kind)), end="\n\n")
