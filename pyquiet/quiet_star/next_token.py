"""`NextTokenTrainer`: the no-thought stage of Fast Quiet-STaR (arXiv 2505.17746) as a transformers Trainer."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction

from pyquiet.checks import check_count
from pyquiet.datasets import IGNORED, TextCollator
from pyquiet.quiet_star.data import labels_in, targets_in
from pyquiet.quiet_star.distillation import (
    NextTokenLoss,
    NtpObjective,
    answering_model,
    check_objective,
    next_token_loss,
)
from pyquiet.quiet_star.inputs import check_context
from pyquiet.quiet_star.modeling import QuietStarForCausalLM
from pyquiet.trainers import SeededArguments, SeededTrainer, check_trainable, tokens_in


@dataclass
class NextTokenTrainingArguments(SeededArguments):
    """`transformers.TrainingArguments` and what a model without thoughts learns from; see `next_token_loss`.

    Raises:
        ValueError, TypeError: an option is out of range.
    """

    ntp_objective: NtpObjective = field(default="advantage", metadata={"help": "What is learned from the teacher."})
    ntp_policy_weight: float = field(
        default=1.0, metadata={"help": 'Of the objective; the release has 1e6, "released".'}
    )
    nll_weight: float = field(default=0.0, metadata={"help": "Of the plain NLL beside it."})
    teacher_thoughts_per_token: int | None = field(default=None, metadata={"help": "None: as the teacher has it."})

    def __post_init__(self) -> None:
        check_objective(self.ntp_objective, self.ntp_policy_weight, self.nll_weight)
        if self.teacher_thoughts_per_token is not None:
            check_count("teacher_thoughts_per_token", self.teacher_thoughts_per_token, least=1)
        super().__post_init__()


class NextTokenCollator(TextCollator):
    """`TextCollator`, and `teacher_nlls` where the examples have them: one float for each token but the first.

    Raises:
        ValueError: as many they are not, or the text is longer than max_length: a crop has another teacher.
    """

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(examples)
        if "teacher_nlls" not in examples[0]:
            return batch
        rows = [torch.as_tensor(example["teacher_nlls"], dtype=torch.float32) for example in examples]
        for example, row, length in zip(examples, rows, batch["attention_mask"].sum(1).tolist(), strict=True):
            if len(row) != length - 1:
                raise ValueError(
                    f"example {example.get('sequence_ids', '')}: {len(row)} teacher_nlls for a text of {length} tokens "
                    f"(max_length is {self.max_length}), but each token but the first needs one; cut longer texts "
                    "before the teacher reads them"
                )
        nlls = pad_sequence(rows, batch_first=True)
        short = batch["input_ids"].shape[1] - 1 - nlls.shape[1]
        return {**batch, "teacher_nlls": nn.functional.pad(nlls, (0, short))}


def next_token_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Mean NLLs and the share of tokens that the teacher predicts better, of `NextTokenTrainer`'s predictions."""
    keep = prediction.label_ids != IGNORED
    student, teacher = (nlls[keep].astype(np.float64) for nlls in prediction.predictions)
    means = {"student_nll": student, "teacher_nll": teacher, "teacher_better": teacher < student}
    return {name: float(values.mean()) for name, values in means.items()}


class NextTokenTrainer(SeededTrainer):
    """Trains a model that answers at once on what a thinking teacher predicts; else as `transformers.Trainer`.

    The teacher is asked online, or long before (`teacher_nlls`, a column of the data). Its thoughts, and the actions
    that "released" draws, depend on (seed, epoch, index of the example) alone, as in `QuietStarTrainer`; the loss of a
    step is that of the joint batch over micro-batches and processes. Logs, besides Trainer's own: student_nll and
    teacher_nll (nats a token), teacher_better (share of tokens) and tokens_per_second; evaluation, on noise that never
    changes, the first three with `eval_`.

    Args:
        model: any causal LM of transformers, in PEFT's wrapping too; of a thinking model the base is trained.
        args: NextTokenTrainingArguments.
        data_collator: None is `NextTokenCollator` with the arguments' max_length and seed.
        train_dataset, eval_dataset: of dicts with `input_ids` and, if need be, `attention_mask`, `labels` and
            `teacher_nlls`, which only "kl" does not read.
        teacher: a thinking model that shares no weight with the student.

    Raises:
        TypeError: the model is no causal LM, or args are plain TrainingArguments.
        ValueError: no weight is trainable, or one is and in half precision; the teacher is missing, is the student, or
            has no room for texts of max_length; several GPUs in one process.
    """

    args: NextTokenTrainingArguments
    collator = NextTokenCollator
    metrics = staticmethod(next_token_metrics)

    def __init__(
        self,
        model: Any,
        args: NextTokenTrainingArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        teacher: QuietStarForCausalLM | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, NextTokenTrainingArguments):
            raise TypeError(f"args must be NextTokenTrainingArguments, got {type(args).__name__}")
        student = answering_model(model)
        _check(student, teacher, args)
        if teacher is not None and not hasattr(teacher, "hf_device_map"):
            teacher.to(args.device)
        self.teacher = teacher
        super().__init__(
            student if isinstance(model, QuietStarForCausalLM) else model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            **kwargs,
        )

    def _counts(self, inputs: dict[str, Any]) -> Tensor:
        return targets_in(inputs).sum()

    def _loss(self, model: Any, inputs: dict[str, Any], counts: Tensor | None) -> tuple[Tensor, NextTokenLoss]:
        out = self._grade(model, inputs, self.training_seed, counts)
        values = {name: getattr(out, name) for name in ("student_nll", "teacher_nll", "teacher_better")}
        self.meter.add({**values, "tokens": tokens_in(inputs)}, joint=counts is not None)
        return out.loss, out

    def _grade(self, model: Any, inputs: dict[str, Any], seed: int, count: Any) -> NextTokenLoss:
        student = self.accelerator.unwrap_model(model)
        forward = functools.partial(
            next_token_loss,
            student,
            attention_mask=inputs.get("attention_mask"),
            labels=inputs.get("labels"),
            ntp_objective=self.args.ntp_objective,
            teacher=self.teacher,
            teacher_nlls=inputs.get("teacher_nlls"),
            policy_weight=self.args.ntp_policy_weight,
            nll_weight=self.args.nll_weight,
            thoughts_per_token=self.args.teacher_thoughts_per_token,
            seed=seed,
            sequence_ids=inputs.get("sequence_ids"),
            target_count=count,
        )
        with self.accelerator.autocast():
            return _through(model, student, forward, inputs["input_ids"])

    def _evaluated(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        out = self._grade(model, inputs, self.evaluation_seed, targets_in(inputs).sum())
        return out.loss, (out.student_nlls, out.teacher_nlls), labels_in(inputs)


def _through(model: Any, student: nn.Module, forward: Any, input_ids: Tensor) -> NextTokenLoss:
    """forward(input_ids=...), run as the student's own, so that what wraps it (DDP, FSDP) takes part."""
    own = vars(student).get("forward")
    student.forward = forward
    try:
        out: NextTokenLoss = model(input_ids=input_ids)
    finally:
        if own is None:
            del student.forward
        else:
            student.forward = own
    return out


def _check(student: Any, teacher: QuietStarForCausalLM | None, args: NextTokenTrainingArguments) -> None:
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ValueError(
            "model has no trainable weight (a prompt of PEFT is none of its own); unfreeze some or add adapters"
        )
    check_trainable(student, args)
    if teacher is None:
        if args.ntp_objective == "kl":
            raise ValueError('teacher is None: ntp_objective="kl" compares whole laws, so it needs one')
        return
    check_context(teacher.config, args.max_length)
    weights = set(map(id, teacher.parameters()))
    if any(id(parameter) in weights for parameter in student.parameters()):
        raise ValueError(
            "teacher shares weights with model and would change with it; give model=copy.deepcopy(teacher.base)"
        )
