"""ATTS: a small model that a large one helps out at a promised rate."""

import time
from collections.abc import Callable
from typing import Any

from pyquiet.demo.scene import Scene
from pyquiet.plotting import View, as_svg, draw_slots, draw_takeovers
from pyquiet.scaling import ATTS, AcceptAll, ATTSResult, Plan, Pools, Question, Report, Sampling, read_questions
from pyquiet.scaling.records import Record
from pyquiet.zoo import folder

_FILES = folder("tiny-target")
_QUESTIONS, _CHAINS, _RATE = 16, 4, 0.4

_NAMES = {"together": "Together", "tiny-draft": "Small model alone", "tiny-target": "Large model alone"}


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
    turns = {turn: row for turn, row in result.report.turns.items() if row.judged and row.guaranteed == row.judged}
    inside = sum(row.band is not None and row.band[0] <= row.taken <= row.band[1] for row in turns.values())
    judged, taken = (sum(getattr(row, name) for row in turns.values()) for name in ("judged", "taken"))
    most = max(turns, key=lambda turn: turns[turn].taken / turns[turn].judged)
    numbers: dict[str, Any] = {
        "questions": _QUESTIONS,
        "chains": _CHAINS,
        "promised": _RATE,
        "lines": judged,
        "replaced": taken,
        "turns_in_band": inside,
        "turns_with_promise": len(turns),
        "rate_by_turn": {str(turn): row.rate.value for turn, row in result.report.turns.items()},
        "runs": runs,
    }

    return Scene(
        "A small model, helped out at a promised rate (ATTS)",
        "A small model writes a solution line by line; a large one rates each line and replaces the unusually bad "
        "ones, at a rate that is promised beforehand.",
        f"{taken / judged:.1%} of the lines replaced, where at most {_RATE:.0%} is promised on average over banks of "
        f"earlier ratings; this is one bank, and {inside} of {len(turns)} turns lie where nine of ten banks put them.",
        (
            *(
                f"{_NAMES[name]}: {run['right']:.0%} of the solutions right, {run['voted']} of {_QUESTIONS} problems "
                f"by vote, {run['seconds']:.1f} s."
                for name, run in runs.items()
            ),
            f"{_QUESTIONS} word problems, {_CHAINS} solutions each, {judged} lines that the promise is about; most was "
            f"replaced at turn {most}, {turns[most].rate.value:.0%}.",
        ),
        numbers,
        lambda: _views(result.report, records),
        ("tiny-draft", "tiny-target"),
    )


def _views(report: Report, records: list[Record]) -> tuple[View, ...]:
    rates, slots = draw_takeovers(report), draw_slots(records)
    bars = (
        "Each dot is the share of lines that the large model replaced at a turn, the first line being turn 0: nine "
        "times in ten it lies in the green band. No promise is made for grey ones, which are seldom reached."
    )
    times = (
        "Each row is a slot that holds one request at a time: the small model writes, the large one rates and "
        "writes, all at once, since no solution waits for another."
    )
    return View(as_svg(rates, bars), words=bars), View(as_svg(slots, times), words=times)


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
