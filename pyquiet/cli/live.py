"""A text on the terminal while it grows or fills in."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from pyquiet.gaps import Codec

# How a run of tokens looks: given, filled in before, filled in by this step, masked.
_STYLES = {"given": "", "filled": "bold", "new": "bold green", "masked": "dim"}


@contextmanager
def shown(codec: "Codec", given: "Tensor", mask_id: int) -> Iterator[Callable[[int, float, "Tensor"], None]]:
    """Gives an `on_step` for `pyquiet.diffuse` that shows the texts until the block ends, and then leaves no trace.

    Args:
        given: bool [T], the positions of each text that are not to be filled.
    """
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    from pyquiet.plotting.page import MASKED

    before: list[list[int]] = []

    def line(ids: list[int], last: list[int]) -> Text:
        states = [
            "given" if known else "masked" if new == mask_id else "new" if old != new else "filled"
            for known, new, old in zip(given.tolist(), ids, last, strict=True)
        ]
        runs = codec.runs(ids, states)
        return Text.assemble(*((MASKED * n if s == "masked" else text, _STYLES[s]) for text, s, n in runs))

    def on_step(step: int, time: float, tokens: "Tensor") -> None:
        rows = tokens.tolist()
        last = before or [[mask_id] * len(row) for row in rows]
        head = Text(f"step {step + 1}, time {time:.2f}", style="dim")
        live.update(Group(head, *(line(*pair) for pair in zip(rows, last, strict=True))), refresh=True)
        before[:] = rows

    console = Console(file=sys.stdout)
    with Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop") as live:
        yield on_step


class Printer:
    """A streamer that prints text as it grows or, with thoughts, a line a token: weight, thought, token."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", show_thoughts: bool) -> None:
        self.tokenizer, self.show_thoughts = tokenizer, show_thoughts
        self.ids: list[int] = []
        self.printed = ""
        self.lines: list[str] = []

    def put(self, value: "Tensor") -> None:
        prompt = not self.ids
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        new = text[len(self.printed) :]
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}")  # else the middle of a character
        if whole:
            self.printed = text
        if not self.show_thoughts and whole:
            print(new, end="", flush=True)
        elif self.show_thoughts and prompt:
            print(text)
        elif self.show_thoughts:
            names = [repr(new)] + [""] * (len(self.lines) - 1)  # a line a thought
            print("\n".join(f"{name:16s} {line}" for name, line in zip(names, self.lines, strict=True)), flush=True)

    def put_thoughts(self, tokens: "Tensor", weight: "Tensor") -> None:
        """Thoughts before the next token: tokens int64 [1, N, m], weight [1, N]."""
        self.lines = [
            f"w {w:+.3f}  thought {self.tokenizer.decode(thought)!r}"
            for thought, w in zip(tokens[0].tolist(), weight[0].tolist(), strict=True)
        ]

    def end(self) -> None:
        rest = self.tokenizer.decode(self.ids, skip_special_tokens=True)[len(self.printed) :]
        print("" if self.show_thoughts else rest, flush=True)
