"""Competition mathematics by a draft and a target behind servers, with the tokenizers of both on this side."""

from __future__ import annotations

import argparse

from pyquiet.scaling import ATTS, Plan, Pools, Sampling
from pyquiet.scaling.backends.openai import OpenAIBackend
from pyquiet.scaling.questions import read_questions

SYSTEM = "Solve the problem step by step. Write the final answer, and nothing else, into \\boxed{}."
# Turns, of 500 tokens at most, that a set needs.
LIMITS = {"math500": 12, "amc": 20, "aime": 30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set", choices=LIMITS)
    parser.add_argument("questions", help="JSONL with problem and answer")
    parser.add_argument("journal", help="what was done so far is not done again")
    for role in ("draft", "target"):
        parser.add_argument(f"--{role}", nargs="+", required=True, metavar="URL", help="one, or replicas")
        parser.add_argument(f"--{role}-tokenizer", required=True, metavar="NAME", help="of the model, or its folder")
    parser.add_argument("--calibration", metavar="DIR", help="a bank; with --calibrate, where it is saved")
    parser.add_argument("--calibrate", metavar="FILE", help="other questions of the same kind")
    parser.add_argument("--takeover-rate", type=float, default=0.4)
    parser.add_argument("--chains", type=int, default=16)
    parser.add_argument("--limit", type=int, help="of the questions, the first ones only")
    args = parser.parse_args()

    atts = ATTS(
        OpenAIBackend(args.draft, tokenizer=args.draft_tokenizer),
        OpenAIBackend(args.target, tokenizer=args.target_tokenizer),
        takeover_rate=args.takeover_rate,
        calibration=None if args.calibrate else args.calibration,
        plan=Plan(
            chains=args.chains,
            turns=LIMITS[args.set],
            draft=Sampling(500, temperature=0.8),
            target=Sampling(500, temperature=0.8),
            pools=Pools(draft=16, score=8, target=4, inflight=64),
        ),
        system=SYSTEM,
    )
    if args.calibrate:
        kept = f"{args.journal}.calibration"  # so that the bank is the same when a run goes on
        atts.calibrate(read_questions(args.calibrate), kind="hierarchical", chains=4, journal=kept)
        if args.calibration:
            atts.save_calibration(args.calibration)
    result = atts.run(read_questions(args.questions)[: args.limit], journal=args.journal)
    print(result.report)


if __name__ == "__main__":
    main()
