"""Hyper-cleaning of generated rows of which 30 % have the wrong label, by both variants of BSVRB.

python recipes/bilevel_cleaning/run.py OUTPUT.json
"""

import argparse
import json
import time
from pathlib import Path

import torch

from pyquiet.bilevel.demonstration import auc
from pyquiet.bilevel.logistic import clean_labels
from pyquiet.files import replacing

ROWS, CLEAN, FEATURES, WRONG = 4000, 1000, 20, 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    rule, X, V = (torch.randn(*shape, generator=g) for shape in ((FEATURES,), (ROWS, FEATURES), (CLEAN, FEATURES)))
    y, right = ((rows @ rule + 0.5 * torch.randn(len(rows), generator=g)).sign() for rows in (X, V))
    wrong = torch.rand(ROWS, generator=g) < WRONG
    runs = []
    for variant in ("v2", "v1"):
        began = time.process_time()
        found = clean_labels(X, torch.where(wrong, -y, y), V, right, variant=variant, progress=False)
        result = {"auc": auc(found.weights, ~wrong), "loss": [found.loss[0], found.loss[-1]], "steps": found.steps[-1]}
        runs.append({"variant": variant, **result, "seconds": time.process_time() - began})
        print(json.dumps(runs[-1]), flush=True)
    with replacing(args.output) as partial:
        partial.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
