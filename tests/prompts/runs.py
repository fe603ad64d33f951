"""Runs over prompts without a model; as a program, one of them or commands of pyquiet in each of several processes.

python -m tests.prompts.runs fake FOLDER BATCH_SIZE KILLED | commands FILE
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyquiet.cli import main
from pyquiet.prompts import Prompt, Ranks, answer_prompts

HEADER = {"command": "fake", "temperature": 0.8, "top_k": None}
PROMPTS = [Prompt(i, f"id {i}", "prompt", f"words {i * i}", f"file, line {i + 1}") for i in range(37)]
EXPECTED = "".join(
    f'{{"index": {i}, "sample": {j}, "text": "words {i * i}", "part": {i / 8}}}\n' for i in range(37) for j in (0, 1)
)


def answer(batch: Sequence[Prompt]) -> tuple[list[list[dict[str, Any]]], dict[str, float]]:
    """Two rows a prompt."""
    rows = [[{"index": p.index, "sample": j, "text": p.text, "part": p.index / 8} for j in range(2)] for p in batch]
    return rows, {"tokens": 2 * len(batch), "seconds": 0.25 * len(batch)}


class Killed:
    """`answer`, until the process is killed in the batch of that number."""

    def __init__(self, batch: int) -> None:
        self.left = batch

    def __call__(self, batch: Sequence[Prompt]) -> tuple[list[list[dict[str, Any]]], dict[str, float]]:
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        return answer(batch)


def fake(folder: Path, batch_size: str, killed: str) -> int:
    """A run, of which rank 2 is killed in that batch."""
    ranks = Ranks.current()
    assert ranks.size == 4
    do = Killed(int(killed)) if ranks.rank == 2 else answer
    cost = answer_prompts(PROMPTS, do, folder / "out.jsonl", HEADER, batch_size=int(batch_size))
    assert (cost == {"tokens": 74, "seconds": 37 / 4}) if ranks.rank == 0 else cost is None
    return 0


if __name__ == "__main__":
    what, path, *words = sys.argv[1:]
    if what == "fake":
        sys.exit(fake(Path(path), *words))
    sys.exit(max(main(command) for command in json.loads(Path(path).read_text())))
