"""The figures of docs/scaling.md: the pair together by both engines, and each model alone, on the shipped questions.

python recipes/tiny_pair/scale.py [--questions N] [--calibration N]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pyquiet
from pyquiet.scaling import ATTS, AcceptAll, Backend, Plan, Sampling, read_questions
from pyquiet.scaling.backends.huggingface import HFBackend
from pyquiet.scaling.score import ChunkView, Graded
from pyquiet.zoo import __file__ as zoo

FILES = Path(zoo).parent / "tiny-target"
PLAN = Plan(chains=8, turns=10, draft=Sampling(48), target=Sampling(48), stop=("\n",))


class Unscored:
    """Asks nobody for a score, so that a model is alone."""

    name = "none"

    async def __call__(self, view: ChunkView, target: Backend) -> Graded:
        return Graded(None, "short")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=128, help="questions to calibrate on")
    args = parser.parse_args()
    questions = read_questions(FILES / "questions.jsonl")[: args.questions]
    pair = ATTS("tiny-draft", "tiny-target", plan=PLAN, on_takeover="replace")
    began = time.perf_counter()
    pair.calibrate(read_questions(FILES / "calibration.jsonl")[: args.calibration])
    print(f"calibrated in {time.perf_counter() - began:.1f} s")
    for engine in ("async", "sync"):
        print(f"\npair, {engine}\n{pair.run(questions, engine=engine).report}", flush=True)
    for name in ("tiny-target", "tiny-draft"):
        alone = HFBackend(*pyquiet.load(name))
        run = ATTS(alone, alone, plan=PLAN, policy=AcceptAll(), score=Unscored()).run(questions)
        print(f"\n{name} alone\n{run.report}", flush=True)


if __name__ == "__main__":
    main()
