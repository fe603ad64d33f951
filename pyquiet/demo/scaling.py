"""ATTS: a small model that a large one helps out at a promised rate."""

import time
from collections.abc import Callable
from typing import Any

from pyquiet.demo.scene import Scene
from pyquiet.plotting.figures import as_svg
from pyquiet.plotting.page import View
from pyquiet.scaling import ATTS, AcceptAll, ATTSResult, Plan, Pools, Question, Sampling, read_questions
from pyquiet.scaling.records import Record
from pyquiet.zoo import folder

_FILES = folder("tiny-target")
_QUESTIONS, _CHAINS, _RATE = 16, 4, 0.4

_NAMES = {"together": "together", "tiny-draft": "small model alone", "tiny-target": "large model alone"}


def show(seed: int, progress: bool) -> Scene:
    """Takes some seconds."""
    lines, pools = Sampling(48), Pools(64, 64, 64)  # models in this process fill batches with what waits
    plan = Plan(chains=_CHAINS, turns=10, draft=lines, target=lines, stop=("\n",), pools=pools, seed=seed)
    pair = ATTS(
        "tiny-draft", "tiny-target", takeover_rate=_RATE, plan=plan, on_takeover="replace", calibration=_FILES
    )  # fmt: skip
    records: list[Record] = []
    questions = read_questions(_FILES / "questions.jsonl")[:_QUESTIONS]
    result, seconds = _timed(pair, questions, records.append)
    runs = {"together": _solved(result, questions) | {"seconds": seconds}}
    for name in ("tiny-draft", "tiny-target"):
        alone, seconds = _timed(ATTS(name, name, plan=plan, policy=AcceptAll()), questions)
        runs[name] = _solved(alone, questions) | {"seconds": seconds}
    every = result.report.turns
    turns = {turn: row for turn, row in every.items() if row.judged and row.guaranteed == row.judged}
    inside = sum(row.band is not None and row.band[0] <= row.taken <= row.band[1] for row in turns.values())
    total, taken = (sum(getattr(row, name) for row in every.values()) for name in ("decisions", "taken"))
    most = max(turns, key=lambda turn: turns[turn].taken / turns[turn].judged)
    numbers: dict[str, Any] = {
        "questions": _QUESTIONS,
        "chains": _CHAINS,
        "promised": _RATE,
        "lines": total,
        "replaced": taken,
        "turns_in_band": inside,
        "turns_with_promise": len(turns),
        "rate_by_turn": {str(turn): row.rate.value for turn, row in every.items()},
        "runs": runs,
    }

    def draw() -> tuple[View, ...]:
        from pyquiet.plotting.scaling import draw_run

        return (View(as_svg(draw_run(result.report, records))),)

    return Scene(
        "A small model, helped out at a promised rate (ATTS)",
        "A small model writes a solution line by line; a large one rates each line and replaces it where it is "
        "unusually bad beside a bank of earlier ratings. How often that happens is promised beforehand.",
        f"{_QUESTIONS} word problems, {_CHAINS} solutions each: {taken / total:.1%} of {total} lines replaced. "
        f"Promised are {_RATE:.0%} at most, on average over banks, at each of {len(turns)} turns; {inside} of them lie "
        f"within what one bank gives in 90 % of cases; most was replaced at turn {most}, {turns[most].rate.value:.0%}. "
        + "; ".join(
            f"{_NAMES[name]}: {run['right']:.0%} of the solutions right, {run['voted']} of {_QUESTIONS} problems by "
            f"vote, {run['seconds']:.1f} s"
            for name, run in runs.items()
        ),
        numbers,
        draw,
    )


def _timed(
    atts: ATTS, questions: list[Question], on_record: Callable[[Record], None] | None = None
) -> tuple[ATTSResult, float]:
    began = time.perf_counter()
    return atts.run(questions, on_record=on_record), time.perf_counter() - began


def _solved(result: ATTSResult, questions: list[Question]) -> dict[str, float]:
    """The share of chains that are right, and how many questions are by their vote."""
    gold = {question.id: question.answer for question in questions}
    chains = [chain.answer == gold[one.question.id] for one in result.questions for chain in one.chains]
    voted = sum(answer == gold[name] for name, answer in result.answers.items())
    return {"right": sum(chains) / len(chains), "voted": voted}
