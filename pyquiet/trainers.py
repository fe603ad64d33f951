"""What the trainers share: noise, crops and losses that do not depend on how a batch is cut up."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from pyquiet.checks import check_count
from pyquiet.datasets import TextCollator, numbered
from pyquiet.randomness import Purpose, Stream, epoch_seed, uniforms

_EVALUATION = 2**32 - 1  # the epoch whose noise evaluation draws from
_GOLDEN = (5**0.5 - 1) / 2
_SHIFT = 1  # the index, in a stream, of what strata are shifted by


@dataclass
class SeededArguments(TrainingArguments):
    """`transformers.TrainingArguments`, and what trainings on numbered texts share."""

    max_length: int = field(default=256, metadata={"help": "Longer texts are cropped at seeded places."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator takes what it knows."})

    def __post_init__(self) -> None:
        check_count("max_length", self.max_length, least=2)
        prepare_arguments(self)
        super().__post_init__()


class SeededTrainer(Trainer):
    """A Trainer whose steps have the loss of the joint batch over micro-batches and processes.

    Subclasses say in `_counts` what the means of a batch divide by, in `_loss` what is learned, adding to the meter
    what they log, and in `_evaluated` what `metrics` is made of.
    """

    collator: type[TextCollator]  # where none is given
    metrics: Callable[[EvalPrediction], dict[str, float]]

    def __init__(
        self, model: Any, args: Any, data_collator: Any, train_dataset: Any, eval_dataset: Any, **kwargs: Any
    ) -> None:
        self.meter = Meter()
        self.current_epoch = 0
        pad = getattr(kwargs.get("processing_class"), "pad_token_id", None) or 0
        data_collator = data_collator or self.collator(args.max_length, data_seed(args), pad)
        kwargs.setdefault("compute_metrics", self.metrics)
        super().__init__(model, args, data_collator, numbered(train_dataset), numbered(eval_dataset), **kwargs)
        self.model_accepts_loss_kwargs = True  # where there are counts, the loss is that of the joint batch
        self.add_callback(_Epochs(self))

    @property
    def training_seed(self) -> int:
        """Of the noise of the epoch that the trainer is in."""
        return epoch_seed(data_seed(self.args), self.current_epoch)

    @property
    def evaluation_seed(self) -> int:
        """Of the noise of evaluation, which is always the same."""
        return epoch_seed(data_seed(self.args), _EVALUATION)

    def _counts(self, inputs: dict[str, Any]) -> Tensor | None:
        """What the means of a batch divide by; None where each micro-batch has its own."""
        raise NotImplementedError

    def _loss(self, model: Any, inputs: dict[str, Any], counts: Tensor | None) -> tuple[Tensor, Any]:
        """A micro-batch's loss, a part of the joint batch's where its counts are given, and all that the model says."""
        raise NotImplementedError

    def _evaluated(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any, Tensor]:
        """The loss of a batch of evaluation, and predictions and labels for `metrics`."""
        raise NotImplementedError

    def _draw_noise(self, batches: list[dict[str, Any]]) -> None:
        """Adds to the micro-batches of a step what is drawn for the whole of it."""

    def _learner(self) -> nn.Module | None:
        """The module whose forward is the loss, for all that wraps a module; None where the model's own is."""

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of an optimiser step, and what the means of their joint batch divide by."""
        self.meter.begin_step()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if any("sequence_ids" not in batch for batch in batches):
            raise ValueError(
                "data_collator must hand on sequence_ids [B] of the examples, which name their noise: without them "
                "every batch would draw the same"
            )
        self._draw_noise(batches)
        counts = [count for batch in batches if (count := self._counts(batch)) is not None]
        if not counts:
            return batches, None
        return batches, self.accelerator.reduce(torch.stack(counts).sum(0).to(device), "sum")

    def strata(self, number: int, batch: dict[str, Any]) -> Tensor:
        """Uniforms [R] of the rows of a step's micro-batch of this number: evenly spread over the whole step."""
        args, processes = self.args, self.accelerator.num_processes
        rows = args.per_device_train_batch_size
        # The places of a step are numbered as in a joint batch: by micro-batch, process and row.
        first = (number * processes + self.accelerator.process_index) * rows
        count = rows * processes * args.gradient_accumulation_steps
        slots = first + torch.arange(len(batch["input_ids"]))
        return stratified(slots, count, seed=data_seed(args), step=self.state.global_step)

    def get_train_dataloader(self) -> Any:
        """Trainer's, the examples numbered."""
        self.train_dataset = numbered(self.train_dataset)  # type: ignore[has-type]
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Trainer's, the examples numbered."""
        return super().get_eval_dataloader(eval_dataset if isinstance(eval_dataset, str) else numbered(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Trainer's, the examples numbered."""
        return super().get_test_dataloader(numbered(test_dataset))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, a part of the joint batch's where `num_items_in_batch` tells its counts."""
        loss, out = self._loss(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None:  # a process has a part of the sum, but gradients are averaged over processes
            loss = loss * self.accelerator.num_processes
        return (loss, out) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The loss of a batch, and what `metrics` is made of."""
        loss, predictions, labels = self._evaluated(model, self._prepare_inputs(inputs))
        return (loss, None, None) if prediction_loss_only else (loss, predictions, labels)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> Any:
        """For training, what the accelerator makes of the learner, if there is one; `self.model` stays."""
        learner = self._learner() if training and model is self.model else None
        if learner is None:
            return super()._wrap_model(model, training, dataloader)
        return self.accelerator.prepare_model(learner)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with what the class says added to the training loss."""
        if "loss" in logs:
            logs.update(self._readings(self.meter.read(self.accelerator)))
        super().log(logs, *args, **kwargs)

    def _readings(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged of the means that the meter read."""
        return means


class Meter:
    """Sums what the steps since the last log report, without waiting for the device."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.steps, self.began = 0, time.perf_counter()
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # micro-batches that had such a mean; no entry where parts add up

    def begin_step(self) -> None:
        if not self.steps:
            self.began = time.perf_counter()
        self.steps += 1

    def add(self, values: dict[str, Tensor], *, joint: bool, known: bool = True) -> None:
        """Takes a micro-batch's values []: parts of a joint batch's, which add up, or means of its own.

        Every process must give the same names; a mean that a micro-batch does not have is not `known`, and 0.
        """
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.double()
            if not joint:
                self.counts[name] = self.counts.get(name, 0) + known

    def read(self, accelerator: Any) -> dict[str, float]:
        """Means over the steps and over all processes; starts anew."""
        names = list(self.sums)
        if not names:
            return {}
        counts = [self.counts.get(name, 0) for name in names]
        sums = torch.stack([self.sums[name] for name in names])
        totals = accelerator.reduce(torch.stack([sums, sums.new_tensor(counts)]), "sum").tolist()
        means = {
            name: total / (count if name in self.counts else self.steps)
            for name, total, count in zip(names, *totals, strict=True)
            if count or name not in self.counts
        }
        means["tokens_per_second"] = totals[0][names.index("tokens")] / (time.perf_counter() - self.began)
        del means["tokens"]
        self.reset()
        return means


class _Epochs(TrainerCallback):
    """Counts the epochs, and tells the training data, whose crops depend on them; a stream's state says too little."""

    def __init__(self, trainer: SeededTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.current_epoch = int(state.epoch or 0) - 1

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.current_epoch += 1
        self.trainer.train_dataset.set_epoch(self.trainer.current_epoch)


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The last checkpoint of a trainer that was written whole: its state, which comes last, can be read."""
    found = [file for file in Path(folder).glob("checkpoint-*/trainer_state.json") if file.parent.name[11:].isdigit()]
    for state in sorted(found, key=lambda state: int(state.parent.name[11:]), reverse=True):
        try:
            json.loads(state.read_text())
        except ValueError:
            continue
        return str(state.parent)
    return None


def stratified(slots: Tensor, count: int, *, seed: int, step: int) -> Tensor:
    """Uniforms [R] of the slots [R] of a step's `count` texts: each is uniform in [0, 1), all of them evenly spread."""
    shift = uniforms(Stream(seed, Purpose.REVEAL, step=step, index=_SHIFT), 1)
    return (shift + slots / count) % 1


def evenly_spread(numbers: Tensor, *, seed: int) -> Tensor:
    """Uniforms [R] of texts of these numbers, int64 [R]: multiples of the golden ratio, which spread evenly."""
    shift = uniforms(Stream(seed, Purpose.REVEAL, index=_SHIFT), 1)
    return (shift + numbers * _GOLDEN) % 1


def text_in(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The tokens of a batch and, where it has one, their mask, by name."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}


def tokens_in(inputs: dict[str, Any]) -> Tensor:
    """[], the tokens of a batch that are no padding."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    tokens: Tensor = ids.new_tensor(ids.numel()) if mask is None else mask.sum()
    return tokens


def data_seed(args: Any) -> int:
    """The seed of data and noise in training arguments."""
    return int(args.seed if args.data_seed is None else args.data_seed)


def check_trainable(model: nn.Module, args: Any) -> None:
    """Raises ValueError for trainable weights in half precision, and for several GPUs in one process."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"model: the trainable weight {name} is {parameter.dtype}, in which small steps are lost; load the "
                "model in float32 (dtype=torch.float32) and set bf16=True in args to compute in bfloat16"
            )
    if args.n_gpu > 1:
        raise ValueError(
            "args: several GPUs in one process; launch with torchrun, or show it one (CUDA_VISIBLE_DEVICES)"
        )


def prepare_arguments(args: TrainingArguments) -> None:
    """What the trainers need of transformers' arguments, before these are completed.

    Raises:
        ValueError: columns that transformers does not know, the epoch's among them, are to be removed.
    """
    if args.remove_unused_columns:
        raise ValueError("remove_unused_columns must be False: the collator takes the columns that it knows")
    if args.greater_is_better is None and "_nll" in (args.metric_for_best_model or ""):
        args.greater_is_better = False
