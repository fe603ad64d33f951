"""ATTS: a small model that a large one helps out at a promised rate."""

from pathlib import Path
from typing import Any

from pyquiet import zoo
from pyquiet.demo.scene import Scene
from pyquiet.plotting.figures import as_svg
from pyquiet.plotting.page import View
from pyquiet.scaling import ATTS, Plan, Pools, Sampling, read_questions
from pyquiet.scaling.records import Record

_FILES = Path(zoo.__file__).parent / "tiny-target"
_QUESTIONS, _CHAINS, _RATE = 16, 4, 0.4


def show(seed: int, progress: bool) -> Scene:
    """Takes a sixth of a minute."""
    lines, pools = Sampling(48), Pools(64, 64, 64)  # models in this process fill batches with what waits
    plan = Plan(chains=_CHAINS, turns=10, draft=lines, target=lines, stop=("\n",), pools=pools, seed=seed)
    atts = ATTS(
        "tiny-draft", "tiny-target", takeover_rate=_RATE, plan=plan, on_takeover="replace", calibration=_FILES
    )  # fmt: skip
    records: list[Record] = []
    questions = read_questions(_FILES / "questions.jsonl")[:_QUESTIONS]
    result = atts.run(questions, on_record=records.append)
    right = sum(result.answers[question.id] == question.answer for question in questions)
    turns = {turn: row for turn, row in result.report.turns.items() if row.judged and row.guaranteed == row.judged}
    replaced, judged = (sum(getattr(row, name) for row in turns.values()) for name in ("taken", "judged"))
    inside = sum(row.band is not None and row.band[0] <= row.taken <= row.band[1] for row in turns.values())
    numbers: dict[str, Any] = {
        "questions": _QUESTIONS,
        "chains": _CHAINS,
        "promised": _RATE,
        "lines": judged,
        "replaced": replaced,
        "turns_in_band": inside,
        "turns_with_promise": len(turns),
        "rate_by_turn": {str(turn): row.rate.value for turn, row in turns.items()},
        "right": right,
    }

    def draw() -> tuple[View, ...]:
        from pyquiet.plotting.scaling import draw_run

        return (View(as_svg(draw_run(result.report, records))),)

    return Scene(
        "A small model, helped out at a promised rate (ATTS)",
        "A small model writes a solution line by line; a large one rates each line and replaces it where it is "
        "unusually bad beside a bank of earlier ratings. How often that happens is promised beforehand.",
        f"{_QUESTIONS} word problems, {_CHAINS} chains each: {replaced / judged:.0%} of {judged} lines replaced "
        f"(promised: at most {_RATE:.0%} at each of {len(turns)} turns, over draws of bank and problems; {inside} of "
        f"them within the 5 to 95 % band); {right} of {_QUESTIONS} answers right by vote",
        numbers,
        draw,
    )
