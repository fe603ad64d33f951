"""What `pyquiet scale` shows while it runs."""

import io

from rich.console import Console

from pyquiet.cli.scale_live import _Board
from pyquiet.scaling.backends.base import Usage
from pyquiet.scaling.records import Action, Decision, Key, Record, Stage


def judged(action: Action, chain: int, turn: int = 0, *, attempt: int = 0, phase: str = "run") -> Record:
    reason = "calibration" if phase == "presample" else "p"
    return Record(Key(phase, "a", chain, turn, "score", attempt), decision=Decision(action, reason))


def wrote(stage: Stage, tokens: int) -> Record:
    return Record(Key("run", "a", 0, 0, stage), usage=Usage(0, 0, tokens))


def end(chain: int, answer: str | None, phase: str = "run", question: str = "a") -> Record:
    outcome = "failed" if phase == "presample" else "answer"
    return Record(Key(phase, question, chain, 1, "end"), outcome=outcome, answer=answer)


def shown(*records: Record) -> str:
    board = _Board("answering", 4, 0.4, {"a": "5"})
    for record in records:
        board.take(record)
    console = Console(width=100, file=io.StringIO())
    console.print(board.table())
    return " ".join(console.file.getvalue().split())


def test_the_rate_is_that_of_first_drafts_as_in_a_report() -> None:
    banked = [judged("accept", chain, phase="presample") for chain in range(4)]
    again = [judged("resample", 2), judged("accept", 2, attempt=1)]
    text = shown(*banked, judged("accept", 0), judged("replace", 1), *again, judged("continue", 0, 1))
    assert "takeovers (promised 40%)" in text
    assert "0 │ 3 │ 66.7%" in text
    assert "1 │ 1 │ 100.0%" in text


def test_chains_answers_and_tokens_are_counted() -> None:
    text = shown(
        wrote("draft", 1200), wrote("target", 30), end(0, "5.0"), end(1, "6"), end(2, None), end(0, "6", question="b"),
        end(3, None, "presample"),
    )  # fmt: skip
    assert "answering: 4 of 4 chains" in text
    assert "33.3% of chains right" in text
    assert "tokens: 1,200 drafted, 30 by the target" in text
