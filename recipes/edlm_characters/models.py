"""The three networks, of 2 layers of width 128, and their trainings, each of minutes on one core."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from letters import BOS, MASK, T
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, ModernBertForMaskedLM, Trainer, TrainingArguments, set_seed

import pyquiet
from pyquiet.trainers import last_checkpoint

BATCH = 64  # windows a step
STEPS = {"ar": 4000, "denoiser": 4000, "energy": 1200}


class Windows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Windows [W, T] as examples, with or without a first symbol."""

    def __init__(self, texts: Tensor, *first: int) -> None:
        self.texts, self.first = texts, torch.tensor(first, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": torch.cat([self.first, self.texts[index]])}


def options(folder: Path, steps: int) -> dict[str, Any]:
    """What the trainings share: BATCH windows a step, a half cosine to 0, a checkpoint now and then."""
    return {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": BATCH, "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine", "warmup_steps": min(100, steps // 10), "weight_decay": 0.01,
        "adam_beta2": 0.98, "max_grad_norm": 1.0, "seed": 0, "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "logging_steps": 100, "save_steps": 500, "save_total_limit": 1,
    }  # fmt: skip


def finish(trainer: Any, folder: Path) -> None:
    """Trains, from the last checkpoint if there is one, and saves."""
    began = time.process_time()
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model()
    print(f"{folder.name}: {trainer.args.max_steps} steps, {time.process_time() - began:.0f} s of processor time here")


def _next_symbol(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = torch.stack([example["input_ids"] for example in examples])
    return {"input_ids": ids, "labels": ids}


def left_to_right(folder: Path, texts: Tensor, steps: int = STEPS["ar"]) -> LlamaForCausalLM:
    """The model that the AR energy asks, trained on windows [W, T] behind BOS, or as it was saved."""
    if not (folder / "config.json").exists():
        set_seed(0)
        config = LlamaConfig(
            vocab_size=BOS + 1, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=384,
            max_position_embeddings=T + 1, bos_token_id=BOS, eos_token_id=None, tie_word_embeddings=True,
        )  # fmt: skip
        args, windows = TrainingArguments(**options(folder, steps)), Windows(texts, BOS)
        finish(Trainer(LlamaForCausalLM(config), args, data_collator=_next_symbol, train_dataset=windows), folder)
    return LlamaForCausalLM.from_pretrained(folder).eval()


def denoiser(folder: Path, texts: Tensor, steps: int = STEPS["denoiser"]) -> ModernBertForMaskedLM:
    """The denoiser, trained on windows [W, T] or as it was saved."""
    if not (folder / "config.json").exists():
        set_seed(0)
        model = pyquiet.diffusion.backbone(
            MASK + 1, mask_token_id=MASK, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=256, max_position_embeddings=T,
        )  # fmt: skip
        args = pyquiet.DiffusionTrainingArguments(**options(folder, steps), max_length=T)
        finish(pyquiet.DiffusionTrainer(model, args, train_dataset=Windows(texts)), folder)
    return ModernBertForMaskedLM.from_pretrained(folder).eval()


def energy(folder: Path, base: ModernBertForMaskedLM, texts: Tensor, steps: int = STEPS["energy"]) -> Any:
    """The energy that corrects the denoiser `base`, trained on windows [W, T] or as it was saved."""
    if not (folder / "config.json").exists():
        set_seed(0)
        args = pyquiet.NCETrainingArguments(**options(folder, steps) | {"learning_rate": 1e-3}, max_length=T)
        model = pyquiet.NCEEnergy.from_denoiser(base)
        finish(pyquiet.NCETrainer(model, args, train_dataset=Windows(texts), denoiser=base), folder)
    return pyquiet.NCEEnergy.from_pretrained(folder).eval()
