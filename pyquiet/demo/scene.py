"""What a part of the demonstration found."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyquiet.evaluation.estimates import Estimate, finite
from pyquiet.plotting import Section, View


@dataclass(frozen=True)
class Scene:
    """A system at work.

    Attributes:
        shows: what the system does, in a sentence for a reader who never heard of it. found: this run's number beside
            its plain alternative, in a sentence. more: further numbers of the run, a sentence each.
        numbers: all of them as JSON values. draw: what there is to look at, made when asked for.
        models: the names of the embedded models at work.
    """

    title: str
    shows: str
    found: str
    more: tuple[str, ...]
    numbers: dict[str, Any]
    draw: Callable[[], tuple[View, ...]]
    models: tuple[str, ...]

    def section(self) -> Section:
        """The part of the page."""
        return Section(self.title, (self.shows,), self.draw(), self.found, self.more)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON values, and what they say."""
        numbers = {name: finite(x) if isinstance(x, float) else x for name, x in self.numbers.items()}
        return {"title": self.title, "shows": self.shows, "found": self.found, "more": self.more, "numbers": numbers}


def lower(by: Estimate) -> str:
    """By how much a number is lower than another, if it is, and whether that may be chance: below two errors."""
    way = "lower" if by.mean > 0 else "higher"
    chance = "" if abs(by.mean) > 2 * by.error else ", which may be chance"
    return f"{abs(by.mean):.3f} +- {by.error:.3f} {way}{chance}"
