"""What the draft loss does: a small model of bytes with and without it, at the same processor time.

    python recipes/any_subset_toy/run.py WORK_FOLDER [--only joint|draft] [--check]

A run that was stopped goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from stdlib_bytes import windows
from torch import Tensor
from transformers import XLNetConfig, XLNetLMHeadModel, set_seed

sys.path.insert(0, str(Path(__file__).parent.parent / "tiny_any_subset"))
from evaluate import calls, score

RATES = (0.5, 0.95)
SAMPLERS = (("assd", 3), ("assd", 5), ("assd", 8), ("one_call", 1), ("one_call", 2), ("one_call", 4))


@dataclass(frozen=True)
class Variant:
    """A weight of the draft loss, and the steps that took some 420 s of one core, or fewer."""

    draft_weight: float
    steps: int


VARIANTS = {"joint": Variant(0.0, 2500), "draft": Variant(0.5, 1600)}


def new_model() -> XLNetLMHeadModel:
    """4 layers of width 128 over the 256 bytes: 0.9 million parameters."""
    return XLNetLMHeadModel(XLNetConfig(vocab_size=256, d_model=128, n_layer=4, n_head=4, d_inner=512, dropout=0.0))


def train(name: str, work: Path, steps: int | None = None) -> XLNetLMHeadModel:
    """The model of this variant, trained or as it was saved in the work folder."""
    from pyquiet.any_subset.arguments import AnySubsetTrainingArguments
    from pyquiet.any_subset.trainer import AnySubsetTrainer
    from pyquiet.trainers import last_checkpoint

    folder, variant = work / name, VARIANTS[name]
    if (folder / "config.json").exists():
        return XLNetLMHeadModel.from_pretrained(folder).eval()
    set_seed(0)
    steps = steps or variant.steps
    args = AnySubsetTrainingArguments(
        str(folder), max_steps=steps, draft_weight=variant.draft_weight, low_mask_rate=0.5, high_mask_rate=0.98,
        per_device_train_batch_size=16, learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=100,
        adam_beta2=0.98, max_length=96, bf16=True, use_cpu=True, seed=0, logging_steps=100, save_steps=200,
        save_total_limit=1, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model, texts = new_model(), [{"input_ids": row} for row in windows()[0]]
    began = time.process_time()
    trainer = AnySubsetTrainer(model, args, train_dataset=texts)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model()
    print(f"{name}: {steps} steps in {time.process_time() - began:.0f} s of processor time")
    return model.eval()


def evaluated(model: Any, texts: Tensor) -> dict[str, Any]:
    """At each mask rate the joint NLL in nats a byte and the acceptance of drafts +1, +2 and +3."""
    found = {f"{rate:.0%}": score(model, texts, rate, seed=1) for rate in RATES}
    return {rate: {"joint_nll": x.joint_nll, "acceptance": x.acceptance} for rate, x in found.items()}


def costs(model: Any, texts: Tensor) -> dict[str, float]:
    """Calls a byte of each sampler that fills 95 % of the texts; of the sequential one it would be 1."""
    return {f"{m} k={k}": calls(model, texts, 0.95, m, k, seed=1, bonus=False) for m, k in SAMPLERS}


def check(results: dict[str, Any]) -> None:
    """What the draft loss must do; AssertionError if it does not."""
    before, after = (results[name]["95%"]["acceptance"][0] for name in ("joint", "draft"))
    assert after - before >= 0.1, f"the acceptance of draft +1 rose by {after - before:.3f}, not by 0.1"
    cost = results["draft"]["calls"]["one_call k=4"]
    assert cost <= 0.55, f"one_call with k=4 took {cost:.3f} calls a byte, more than 0.55"
    print(f"as it should be: acceptance of draft +1 {before:.3f} -> {after:.3f}, one_call k=4 {cost:.3f} calls a byte")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("work", type=Path, help="folder for checkpoints, models and results.json")
    parser.add_argument("--only", choices=list(VARIANTS), help="train this one and stop")
    parser.add_argument("--check", action="store_true", help="fail unless the draft loss does what it should")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only:
        train(args.only, args.work)
        return
    held_out = windows()[1]
    held_out = held_out[:: len(held_out) // 512][:512]
    results = {}
    for name in VARIANTS:
        model = train(name, args.work)
        results[name] = {**evaluated(model, held_out), "calls": costs(model, held_out[:64])}
        print(name, json.dumps(results[name], indent=1))
    (args.work / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.check:
        check(results)


if __name__ == "__main__":
    main()
