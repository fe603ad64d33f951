"""What a part of the demonstration found."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyquiet.evaluation.estimates import finite
from pyquiet.plotting.page import Section, View


@dataclass(frozen=True)
class Scene:
    """A system at work.

    Attributes:
        shows: what the system does, for a reader who never heard of it. found: this run's numbers in a sentence.
        numbers: the same as JSON values. draw: what there is to look at, made when asked for.
    """

    title: str
    shows: str
    found: str
    numbers: dict[str, Any]
    draw: Callable[[], tuple[View, ...]]

    def section(self) -> Section:
        """The part of the page."""
        return Section(self.title, (self.shows, self.found), self.draw())

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON values, and what they say."""
        numbers = {name: finite(x) if isinstance(x, float) else x for name, x in self.numbers.items()}
        return {"title": self.title, "shows": self.shows, "found": self.found, "numbers": numbers}
