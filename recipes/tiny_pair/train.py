"""Train the draft or the target on generated problems, on one CPU core.

    python recipes/tiny_pair/train.py draft|target WORK_FOLDER --steps N

A run that was stopped goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from texts import BOS, CONTEXT, EOS, PAD, Texts, family_tokenizer, padded
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from pyquiet.trainers import last_checkpoint

ROWS = 16  # texts a step


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    heads: int
    inner: int
    peak_rate: float


SIZES = {"draft": Size(64, 3, 2, 192, 3e-3), "target": Size(160, 5, 5, 352, 2e-3)}


def new_model(size: Size, vocabulary: int) -> LlamaForCausalLM:
    """Random weights of a spread at which looking things up in the question is learned soon."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=size.width**-0.5,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # on CPUs faster in bfloat16 than the fused one
    return model


def train(name: str, work: Path, steps: int, save_every: int) -> None:
    set_seed(0)
    tokenizer = family_tokenizer()
    model = new_model(SIZES[name], len(tokenizer))
    arguments = TrainingArguments(
        str(work),
        max_steps=steps,
        per_device_train_batch_size=ROWS,
        train_sampling_strategy="group_by_length",
        learning_rate=SIZES[name].peak_rate,
        lr_scheduler_type="cosine",
        warmup_steps=200,
        weight_decay=0.1,
        adam_beta2=0.98,
        bf16=True,
        use_cpu=True,
        logging_steps=100,
        save_steps=save_every,
        save_total_limit=1,
        report_to=[],
    )
    # Every text is read once.
    texts = Texts(tokenizer, steps * ROWS)
    trainer = Trainer(model, arguments, data_collator=padded, train_dataset=texts, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=last_checkpoint(work))
    trainer.save_model()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("name", choices=SIZES)
    parser.add_argument("work", type=Path, help="folder for the model and its checkpoints")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-every", type=int, default=500)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.name, args.work, args.steps, args.save_every)


if __name__ == "__main__":
    main()
