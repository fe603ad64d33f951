"""Train the base without thoughts on the very crops of `pyquiet train quiet-star`, for comparison.

python recipes/tiny_thinker/plain.py BASE_FOLDER MODEL_FOLDER TEXT_FILE ... [--steps N]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from pyquiet.datasets import TextCollator, numbered
from pyquiet.files import read_texts
from pyquiet.quiet_star.data import tokenize


class PlainCollator(TextCollator):
    """The same crops, with labels for a plain language model."""

    def __call__(self, examples: Any) -> dict[str, Any]:
        batch = super().__call__(examples)
        del batch["sequence_ids"]
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


class Epochs(TrainerCallback):
    """Tells the data the epoch, from which its crops are drawn."""

    def __init__(self, texts: Any) -> None:
        self.texts = texts

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.texts.set_epoch(int(state.epoch or 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("model", type=Path, help="folder to write")
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    texts = numbered(tokenize(read_texts(args.text), tokenizer, 256))
    settings = TrainingArguments(
        str(args.model), max_steps=args.steps, per_device_train_batch_size=8, learning_rate=3e-4, warmup_steps=20,
        lr_scheduler_type="cosine", weight_decay=1e-3, seed=0, bf16=True, use_cpu=True, logging_steps=10,
        save_strategy="no", report_to="none", remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model, settings, PlainCollator(256, seed=0), texts, callbacks=[Epochs(texts)])
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(args.model)


if __name__ == "__main__":
    main()
