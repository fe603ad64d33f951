"""Teach a trained draft to think (Quiet-STaR) on texts of the same kind, and see whether it solves more problems.

    python recipes/tiny_pair/think.py DRAFT_FOLDER THINKER_FOLDER --steps N

A run that was stopped goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from evaluate import TABLE_HEAD, accuracy_row, load, solutions
from texts import Texts, held_out

import pyquiet
from pyquiet.trainers import last_checkpoint

ROWS = 8  # texts a step
LONGEST = 384  # tokens, more than any text has


def train(draft: Path, work: Path, steps: int) -> None:
    base, tokenizer = load(draft)
    torch.manual_seed(0)  # of the mixing head
    model = pyquiet.QuietStarForCausalLM.from_base(base, thought_tokens=4)
    arguments = pyquiet.QuietStarTrainingArguments(
        str(work),
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        learning_rate=3e-4,
        head_learning_rate=1e-3,
        meta_learning_rate=3e-5,
        max_length=LONGEST,
        warmup_steps=20,
        lr_scheduler_type="cosine",
        use_cpu=True,
        logging_steps=20,
        save_steps=100,
        save_total_limit=1,
        report_to=[],
    )
    texts = Texts(tokenizer, steps * ROWS)
    trainer = pyquiet.QuietStarTrainer(model, arguments, train_dataset=texts, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=last_checkpoint(work))
    trainer.save_model()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("draft", type=Path, help="folder of the draft")
    parser.add_argument("thinker", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--problems", type=int, default=400, help="how many held-out problems to try")
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.draft, args.thinker, args.steps)
    problems = held_out("evaluation")[: args.problems]
    print(TABLE_HEAD)
    for temperature, way in ((0.0, "greedy"), (0.8, "temperature 0.8")):
        model, tokenizer = load(args.draft)
        print(accuracy_row("draft", way, problems, solutions(model, tokenizer, problems, temperature)), flush=True)
        model, tokenizer = load(args.thinker)
        for name, think in (("thinker", "always"), ("thinker without thoughts", "never")):
            written = solutions(model, tokenizer, problems, temperature, think=think)
            print(accuracy_row(name, way, problems, written), flush=True)


if __name__ == "__main__":
    main()
