"""Held-out joint NLL and acceptance of drafts, by how much is masked, and what infilling costs.

python recipes/tiny_any_subset/evaluate.py MODEL_FOLDER HELD_OUT_JSONL
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, XLNetLMHeadModel

import pyquiet
from pyquiet.any_subset.training import random_order, subset_scores
from pyquiet.datasets import packed, read_dataset

LENGTH, BATCH = 128, 32
RATES = (0.05, 0.15, 0.3, 0.5, 0.7, 0.95)
SAMPLERS = (("sequential", 1), ("assd", 3), ("assd", 5), ("one_call", 1), ("one_call", 2), ("one_call", 4))
FILLED = 64  # texts that the samplers fill


@dataclass(frozen=True)
class Scores:
    """Over `targets` tokens: joint NLL in nats a token, and the acceptance of drafts +1, +2 and +3."""

    targets: int
    joint_nll: float
    acceptance: list[float]


def score(model: Any, texts: Tensor, rate: float, seed: int = 0) -> Scores:
    """Of texts int64 [W, N], of each of which this share is to be filled."""
    order, prompt = _drawn(texts, rate, seed)
    parts = [slice(start, start + BATCH) for start in range(0, len(texts), BATCH)]
    found = [subset_scores(model, texts[part], order=order[part], prompt=prompt[part]) for part in parts]
    nll, targets, accepted, drafts = (torch.cat(x).double().sum(0) for x in zip(*found, strict=True))
    return Scores(int(targets), (nll / targets).item(), (accepted / drafts).tolist())


def calls(model: Any, texts: Tensor, rate: float, method: str, k: int, *, seed: int = 0, bonus: bool = True) -> float:
    """Calls of the network a token that a sampler fills, of the same texts."""
    order, prompt = _drawn(texts, rate, seed)
    mask = torch.zeros_like(texts, dtype=torch.bool)
    for row, (places, m) in enumerate(zip(order, prompt.tolist(), strict=True)):
        mask[row, places[m:]] = True
    out = pyquiet.infill(model, texts, mask=mask, method=method, k=k, seed=0, bonus=bonus)
    return sum(int(x.sum()) for x in out.calls.values()) / int(mask.sum())


def _drawn(texts: Tensor, rate: float, seed: int) -> tuple[Tensor, Tensor]:
    return random_order(torch.full((len(texts),), rate), texts, seed=seed, sequence_ids=torch.arange(len(texts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("held_out", type=Path)
    args = parser.parse_args()
    model = XLNetLMHeadModel.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pieces = packed(read_dataset(str(args.held_out), "text"), tokenizer, LENGTH)
    texts = torch.stack([piece["input_ids"] for piece in pieces if len(piece["input_ids"]) == LENGTH])
    print("| masked | tokens | joint NLL | accepted: draft +1 | +2 | +3 |\n|---|---|---|---|---|---|")
    for rate in RATES:
        found = score(model, texts, rate)
        shares = " | ".join(f"{share:.3f}" for share in found.acceptance)
        print(f"| {rate:.0%} | {found.targets} | {found.joint_nll:.4f} | {shares} |")
    some = texts[:: len(texts) // FILLED][:FILLED]
    print("\n| calls a token | " + " | ".join(f"{rate:.0%} masked" for rate in RATES[3:]) + " |\n|---|---|---|---|")
    for method, k in SAMPLERS:
        name = method if method == "sequential" else f"{method}, k={k}"
        print(f"| {name} | " + " | ".join(f"{calls(model, some, rate, method, k):.3f}" for rate in RATES[3:]) + " |")


if __name__ == "__main__":
    main()
