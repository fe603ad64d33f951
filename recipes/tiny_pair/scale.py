"""The figures of docs/scaling.md: the pair together by both engines, and each model alone, on the shipped questions.

All have 64 slots of every kind, as many as there are chains under way: a model in this process batches what it gets.

python recipes/tiny_pair/scale.py [--questions N] [--calibration N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pyquiet
from pyquiet.scaling import ATTS, AcceptAll, Plan, Pools, Sampling, read_questions
from pyquiet.scaling.backends.huggingface import HFBackend
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
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=128, help="questions to calibrate on")
    args = parser.parse_args()
    questions = read_questions(FILES / "questions.jsonl")[: args.questions]
    pair = ATTS("tiny-draft", "tiny-target", plan=PLAN, on_takeover="replace")
    with timed("calibration"):
        pair.calibrate(read_questions(FILES / "calibration.jsonl")[: args.calibration])
    for engine in ("async", "sync"):
        with timed(f"pair, {engine}"):
            print(pair.run(questions, engine=engine).report)
    for name in ("tiny-target", "tiny-draft"):
        alone = HFBackend(*pyquiet.load(name))
        with timed(f"{name} alone"):
            print(ATTS(alone, alone, plan=PLAN, policy=AcceptAll()).run(questions).report)


if __name__ == "__main__":
    main()
