"""NLL of held-out text under a thinking model, one trained without thoughts and the one both came from, by decile.

python recipes/tiny_thinker/compare.py BASE_FOLDER PLAIN_FOLDER THINKER_FOLDER TEXT_FILE ... [--thoughts-per-token N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyquiet import QuietStarForCausalLM
from pyquiet.evaluation import TokenGains, gain_by_decile, opening_ids, thinking_gains, token_ids
from pyquiet.files import read_texts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("plain", type=Path)
    parser.add_argument("thinker", type=Path)
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--thoughts-per-token", type=int, default=1)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    rows = [[*token_ids(tokenizer, text), tokenizer.eos_token_id] for text in read_texts(args.text)]

    def read(model: QuietStarForCausalLM, thoughts: int = 1) -> TokenGains:
        return thinking_gains(
            model.eval(), rows, seed=0, thoughts_per_token=thoughts, opening=opening_ids(tokenizer), overlap=64
        )

    def without_thoughts(folder: Path) -> TokenGains:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return read(QuietStarForCausalLM.from_base(base, thought_tokens=0))

    start, plain = without_thoughts(args.base), without_thoughts(args.plain)
    thinker = read(QuietStarForCausalLM.from_pretrained(args.thinker, dtype=torch.float32), args.thoughts_per_token)
    against_plain = gain_by_decile(start.entropy, plain.base_nll, thinker.mixed_nll)
    own = gain_by_decile(start.entropy, thinker.base_nll, thinker.mixed_nll)
    before = gain_by_decile(start.entropy, start.base_nll, plain.base_nll)
    print("| tenth by entropy | before | plain | thinker, base | thinker, mixed | plain - mixed | base - mixed |")
    print("|---|---|---|---|---|---|---|")
    tables = [(table.rows(), table.total.rows()) for table in (before, against_plain, own)]
    for rank in range(11):
        b, a, o = (total[0] if rank == 10 else bins[rank] for bins, total in tables)
        print(
            f"| {'all' if rank == 10 else rank + 1} | {b['base_nll']:.4f} | {a['base_nll']:.4f} | {o['base_nll']:.4f} "
            f"| {a['mixed_nll']:.4f} | {a['gain']:+.4f} +- {a['gain_error']:.4f} "
            f"| {o['gain']:+.4f} +- {o['gain_error']:.4f} |"
        )
    print(f"{len(start.token)} tokens; mean w {thinker.weight.mean():.4f}")


if __name__ == "__main__":
    main()
