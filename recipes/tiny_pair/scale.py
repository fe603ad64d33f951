"""The figures of docs/scaling.md: the pair together by both engines, and each model alone, on the shipped questions.

All have 64 slots of every kind, as many as there are chains under way: a model in this process batches what it gets.

python recipes/tiny_pair/scale.py [--questions N] [--calibration N]
python recipes/tiny_pair/scale.py --draft THINKER --questions 24 --chains 4 --calibration 96 --calibration-chains 2 \
    --engine sync        (a thinking draft, which think.py has made)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pyquiet.scaling import ATTS, AcceptAll, Plan, Pools, Sampling, read_questions
from pyquiet.zoo import folder

FILES = folder("tiny-target")
PLAN = Plan(chains=8, turns=10, draft=Sampling(48), target=Sampling(48), stop=("\n",), pools=Pools(64, 64, 64, 64))


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Prints how long it took by the clock, and of the processor's time."""
    began, used = time.perf_counter(), time.process_time()
    yield
    print(
        f"{what}: {time.perf_counter() - began:.1f} s, {time.process_time() - used:.1f} s of processors\n", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--draft", default="tiny-draft", help="a folder, for another one")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--chains", type=int, default=PLAN.chains)
    parser.add_argument("--calibration", type=int, default=128, help="questions to calibrate on")
    parser.add_argument("--calibration-chains", type=int, default=4)
    parser.add_argument("--engine", nargs="+", default=["async", "sync"], choices=("async", "sync"))
    parser.add_argument("--journals", type=Path, metavar="DIR", help="where to keep them, for pyquiet scale report")
    args = parser.parse_args()

    def kept(name: str) -> Path | None:
        return None if args.journals is None else args.journals / f"{name}.jsonl"

    questions, plan = read_questions(FILES / "questions.jsonl")[: args.questions], replace(PLAN, chains=args.chains)
    pair = ATTS(args.draft, "tiny-target", plan=plan, on_takeover="replace")
    with timed("calibration"):
        others = read_questions(FILES / "calibration.jsonl")[: args.calibration]
        pair.calibrate(others, chains=args.calibration_chains, journal=kept("calibration"))
    for engine in args.engine:
        with timed(f"pair, {engine}"):
            print(pair.run(questions, engine=engine, journal=kept(engine)).report)
    for role, model in (("target", pair.target), ("draft", pair.draft)):
        with timed(f"{role} alone"):
            print(ATTS(model, model, plan=plan, policy=AcceptAll()).run(questions, journal=kept(role)).report)


if __name__ == "__main__":
    main()
