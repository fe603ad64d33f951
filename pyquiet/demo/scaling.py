"""ATTS: a small model that a large one helps out at a promised rate."""

from pathlib import Path
from typing import Any

from pyquiet import zoo
from pyquiet.demo.scene import Scene
from pyquiet.plotting.figures import as_svg
from pyquiet.plotting.page import View
from pyquiet.scaling import ATTS, Plan, Sampling, read_questions
from pyquiet.scaling.records import Record

_FILES = Path(zoo.__file__).parent / "tiny-target"
_QUESTIONS, _CALIBRATION, _CHAINS, _RATE = 16, 64, 4, 0.4


def show(seed: int, progress: bool) -> Scene:
    """Takes a sixth of a minute."""
    plan = Plan(chains=_CHAINS, turns=10, draft=Sampling(48), target=Sampling(48), stop=("\n",), seed=seed)
    atts = ATTS("tiny-draft", "tiny-target", takeover_rate=_RATE, plan=plan, on_takeover="replace")
    atts.calibrate(read_questions(_FILES / "calibration.jsonl")[:_CALIBRATION], chains=2)
    records: list[Record] = []
    questions = read_questions(_FILES / "questions.jsonl")[:_QUESTIONS]
    result = atts.run(questions, engine="sync", on_record=records.append)
    right = sum(result.answers[question.id] == question.answer for question in questions)
    first = result.report.turns[0]
    numbers: dict[str, Any] = {
        "questions": _QUESTIONS,
        "chains": _CHAINS,
        "promised": _RATE,
        "first_turn": first.rate.value,
        "first_turn_interval": [first.rate.low, first.rate.high],
        "right": right,
    }

    def draw() -> tuple[View, ...]:
        from pyquiet.plotting.scaling import draw_run

        return (View(as_svg(draw_run(result.report, records))),)

    return Scene(
        "A small model, helped out at a promised rate (ATTS)",
        "A small model writes a solution line by line; a large one rates each line and replaces it where it is "
        "unusually bad beside a bank of earlier ratings. How often that happens is promised beforehand.",
        f"{_QUESTIONS} word problems, {_CHAINS} chains each: {first.rate.value:.0%} of the first lines replaced "
        f"(promised: at most {_RATE:.0%}, over draws of bank and questions), {right} of {_QUESTIONS} answers right "
        "by vote",
        numbers,
        draw,
    )
