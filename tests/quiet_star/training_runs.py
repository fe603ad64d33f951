"""Short runs of the trainer; as a program, one of them in each of several processes (torchrun)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pyquiet import QuietStarTrainer, QuietStarTrainingArguments

from .thinkers import random_ids, thinker


def examples(count: int, *, longest: int) -> list[dict[str, Tensor]]:
    """Texts of several lengths up to the longest."""
    return [{"input_ids": random_ids(1, longest - i % 4, seed=i)[0]} for i in range(count)]


def arguments(folder: Path, **changes: Any) -> QuietStarTrainingArguments:
    """Two steps of plain gradient descent over the examples in their order, unless changed."""
    settings: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "seed": 0,
        "max_length": 16,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "train_sampling_strategy": "sequential",
    }
    return QuietStarTrainingArguments(str(folder), **{**settings, **changes})


def run(model: Any, settings: QuietStarTrainingArguments, texts: Any, **options: Any) -> QuietStarTrainer:
    """A trainer after its run."""
    resume = options.pop("resume_from_checkpoint", None)
    trainer = QuietStarTrainer(model, settings, train_dataset=texts, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model: Any) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def main(folder: Path, accumulate: int) -> None:
    torch.set_num_threads(1)
    model = thinker(m=2)
    settings = arguments(
        folder / "two", max_steps=3, optim="adamw_torch", gradient_accumulation_steps=accumulate, ddp_backend="gloo"
    )
    trainer = run(model, settings, examples(24, longest=9))
    assert trainer.args.world_size == 2
    if trainer.is_world_process_zero():
        save_file(weights(model), folder / "two.safetensors")
        torch.save(trainer.state.log_history, folder / "logs.pt")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
