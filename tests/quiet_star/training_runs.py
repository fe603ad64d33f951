"""Short runs of the trainer; as a program, one of them in each of several processes (torchrun)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from pyquiet import QuietStarObjective, QuietStarTrainer, QuietStarTrainingArguments

from ..plain_descent import PLAIN_DESCENT
from .thinkers import random_ids, thinker


def examples(count: int, *, longest: int) -> list[dict[str, Tensor]]:
    """Texts of several lengths up to the longest."""
    return [{"input_ids": random_ids(1, longest - i % 4, seed=i)[0]} for i in range(count)]


def mixed_examples() -> list[dict[str, Tensor]]:
    """Texts of which, with two to a batch, every other batch is too short for tenths of its tokens."""
    texts = examples(24, longest=9)
    return [{"input_ids": x["input_ids"][: 4 if i % 4 > 1 else None]} for i, x in enumerate(texts)]


def arguments(folder: Path, **changes: Any) -> QuietStarTrainingArguments:
    """Two steps of plain gradient descent over the examples in their order, unless changed."""
    settings = PLAIN_DESCENT | {"learning_rate": 0.01}
    if "curriculum" in changes:
        del settings["max_steps"]
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


def distributed(folder: Path, accumulate: str) -> None:
    """A run of the trainer, the batch spread over the processes."""
    settings = arguments(
        folder / "two",
        max_steps=3,
        optim="adamw_torch",
        gradient_accumulation_steps=int(accumulate),
        ddp_backend="gloo",
    )
    model = thinker(m=2)
    trainer = run(model, settings, mixed_examples())
    assert trainer.args.world_size == 2
    if trainer.is_world_process_zero():
        save_file(weights(model), folder / "two.safetensors")
        torch.save(trainer.state.log_history, folder / "logs.pt")
    trainer.accelerator.end_training()


def sharded_by_hand(folder: Path) -> None:
    """The gradients of a step whose weights are spread over the processes, layer by layer (FSDP2, on the CPU)."""
    torch.distributed.init_process_group("gloo")
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = torch.distributed.init_device_mesh("cpu", (count,))
    model, ids, objective = thinker(m=2).train(), random_ids(2 * count, 9), QuietStarObjective()
    for part in (*model.base.model.layers, model):
        fully_shard(part, mesh=mesh)
    rows = torch.arange(2 * rank, 2 * rank + 2)
    counts = objective.target_counts(ids)
    out = model(ids[rows], objective=objective, seed=1, sequence_ids=rows, target_counts=counts)
    (count * out.loss).backward()  # the mean over processes is taken
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        save_file(gradients, folder / "gradients.safetensors")
    torch.distributed.destroy_process_group()


def sharded_on_gpus(folder: Path) -> None:
    """A run of the trainer under FSDP2 through accelerate."""
    layers = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    settings = arguments(
        folder / "fsdp", use_cpu=False, max_steps=3, fsdp="full_shard auto_wrap", fsdp_config=layers, bf16=False
    )
    trainer = run(thinker(m=2, dtype=torch.float32), settings, examples(24, longest=9))
    state = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.is_world_process_zero():
        save_file({name: value.cpu().contiguous() for name, value in state.items()}, folder / "fsdp.safetensors")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, target, *words = sys.argv[1:]
    {"distributed": distributed, "sharded": sharded_by_hand, "gpus": sharded_on_gpus}[what](Path(target), *words)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process that ends by itself
