"""Short runs of the trainer; as a program, one of them in each of several processes (torchrun)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pyquiet import AnySubsetTrainer, AnySubsetTrainingArguments

from ..plain_descent import PLAIN_DESCENT
from .models import random_xlnet

V = 11


def model(dropout: float = 0.0) -> Any:
    """A small XLNet in float64."""
    return random_xlnet(V, scale=0.7, dropout=dropout).double()


def examples(count: int) -> list[dict[str, Tensor]]:
    """Texts of several lengths, 6 to 9 tokens."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, V, (9 - i % 4,), generator=generator)} for i in range(count)]


def arguments(folder: Path, **changes: Any) -> AnySubsetTrainingArguments:
    """Two steps of plain gradient descent over the examples in their order, unless changed."""
    settings = PLAIN_DESCENT | {"learning_rate": 0.1}
    return AnySubsetTrainingArguments(str(folder), **{**settings, **changes})


def run(trained: Any, settings: AnySubsetTrainingArguments, texts: Any, **options: Any) -> AnySubsetTrainer:
    """A trainer after its run."""
    resume = options.pop("resume_from_checkpoint", None)
    trainer = AnySubsetTrainer(trained, settings, train_dataset=texts, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trained: Any) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in trained.named_parameters()}


def distributed(folder: Path, accumulate: str) -> None:
    """A run of the trainer, the batch spread over the processes."""
    steps = {"max_steps": 3, "optim": "adamw_torch", "gradient_accumulation_steps": int(accumulate)}
    trained = model()
    settings = arguments(folder / "two", ddp_backend="gloo", **steps)
    trainer = run(trained, settings, examples(24), eval_dataset=examples(5))
    assert trainer.args.world_size == 2
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    evaluation = trainer.evaluate()
    if trainer.is_world_process_zero():
        save_file(weights(trained), folder / "two.safetensors")
        torch.save((trainer.state.log_history, evaluation), folder / "logs.pt")
        trainer.save_model(str(folder / "saved"))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process that ends by itself
