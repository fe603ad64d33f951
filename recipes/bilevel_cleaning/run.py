"""Hyper-cleaning of generated rows of which 30 % have the wrong label, by both variants of BSVRB, as one line of JSON.

python recipes/bilevel_cleaning/run.py [v1|v2 ...]
"""

import json
import sys
import time

import torch

from pyquiet.bilevel.demonstration import auc
from pyquiet.bilevel.logistic import clean_labels

ROWS, CLEAN, FEATURES, WRONG = 4000, 1000, 20, 0.3


def main() -> None:
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    rule, X, V = (torch.randn(*shape, generator=g) for shape in ((FEATURES,), (ROWS, FEATURES), (CLEAN, FEATURES)))
    y, right = ((rows @ rule + 0.5 * torch.randn(len(rows), generator=g)).sign() for rows in (X, V))
    wrong = torch.rand(ROWS, generator=g) < WRONG
    for variant in sys.argv[1:] or ["v2", "v1"]:
        began = time.process_time()
        found = clean_labels(X, torch.where(wrong, -y, y), V, right, variant=variant, progress=False)
        result = {"auc": auc(found.weights, ~wrong), "loss": [found.loss[0], found.loss[-1]], "steps": found.steps[-1]}
        print(json.dumps({"variant": variant, **result, "seconds": time.process_time() - began}), flush=True)


if __name__ == "__main__":
    main()
