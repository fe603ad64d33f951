"""Short runs of the trainers; as a program, one of them in each of several processes (torchrun)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from pyquiet.diffusion.arguments import DiffusionTrainingArguments, NCETrainingArguments
from pyquiet.diffusion.nce_energy import NCEEnergy
from pyquiet.diffusion.trainer import DiffusionTrainer, NCETrainer

from ..plain_descent import PLAIN_DESCENT

V, MASK = 12, 11


def model(dropout: float = 0.0) -> Any:
    """A small BERT in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=128, pad_token_id=0, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout, initializer_range=0.3, mask_token_id=MASK,
        )  # fmt: skip
        return BertForMaskedLM(config).double().eval()


def examples(count: int) -> list[dict[str, Tensor]]:
    """Texts of several lengths, 6 to 9 tokens."""
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, MASK, (9 - i % 4,), generator=generator)} for i in range(count)]


def arguments(folder: Path, **changes: Any) -> DiffusionTrainingArguments:
    """Two steps of plain gradient descent over the examples in their order, unless changed."""
    settings = PLAIN_DESCENT | {"learning_rate": 0.1}
    return DiffusionTrainingArguments(str(folder), **{**settings, **changes})


def run(trained: Any, settings: DiffusionTrainingArguments, texts: Any, **options: Any) -> DiffusionTrainer:
    """A trainer after its run."""
    resume = options.pop("resume_from_checkpoint", None)
    trainer = DiffusionTrainer(trained, settings, train_dataset=texts, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def energy() -> NCEEnergy:
    """A small energy in float64, which is not 0."""
    found = NCEEnergy.from_denoiser(model()).double().eval()
    with torch.no_grad():
        found.head[-1].weight.fill_(0.1)
    return found


def nce_arguments(folder: Path, **changes: Any) -> NCETrainingArguments:
    settings = PLAIN_DESCENT | {"learning_rate": 0.1, "negatives": 2}
    return NCETrainingArguments(str(folder), **{**settings, **changes})


def run_nce(trained: NCEEnergy, settings: NCETrainingArguments, texts: Any, **options: Any) -> NCETrainer:
    """A trainer after its run; the denoiser is `model()` unless another is given."""
    resume = options.pop("resume_from_checkpoint", None)
    options.setdefault("denoiser", model())
    trainer = NCETrainer(trained, settings, train_dataset=texts, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trained: Any) -> dict[str, Tensor]:
    """Copies of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in trained.named_parameters()}


def distributed(folder: Path, method: str, accumulate: str) -> None:
    """A run of a trainer, the batch spread over the processes."""
    steps = {"max_steps": 3, "optim": "adamw_torch", "gradient_accumulation_steps": int(accumulate)}
    steps |= {"ddp_backend": "gloo"}
    options = {"eval_dataset": examples(5)}
    if method == "diffusion":
        trainer: Any = run(model(), arguments(folder / "two", **steps), examples(24), **options)
    else:
        trainer = run_nce(energy(), nce_arguments(folder / "two", **steps), examples(24), **options)
    assert trainer.args.world_size == 2
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    evaluation = trainer.evaluate()
    if trainer.is_world_process_zero():
        save_file(weights(trainer.model), folder / "two.safetensors")
        torch.save((trainer.state.log_history, evaluation), folder / "logs.pt")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed(Path(sys.argv[1]), *sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process that ends by itself
