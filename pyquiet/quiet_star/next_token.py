"""`NextTokenTrainer`: the no-thought stage of Fast Quiet-STaR (arXiv 2505.17746) as a transformers Trainer."""

import functools
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import EvalPrediction, TrainingArguments

from pyquiet.checks import check_count
from pyquiet.datasets import IGNORED, NumberedTexts, TextCollator
from pyquiet.environment import fingerprint
from pyquiet.files import replacing
from pyquiet.quiet_star.data import labels_in, targets_in
from pyquiet.quiet_star.distillation import (
    NextTokenLoss,
    NtpObjective,
    answering_model,
    check_objective,
    mixed_nlls,
    next_token_loss,
)
from pyquiet.quiet_star.inputs import check_context
from pyquiet.quiet_star.modeling import QuietStarForCausalLM
from pyquiet.randomness import epoch_seed
from pyquiet.trainers import SeededTrainer, check_trainable, prepare_arguments, tokens_in

_SAVE_EVERY = 60.0  # seconds


@dataclass
class NextTokenTrainingArguments(TrainingArguments):
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
    max_length: int = field(default=256, metadata={"help": "Longer texts are cropped at seeded places."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator takes what it knows."})

    def __post_init__(self) -> None:
        check_objective(self.ntp_objective, self.ntp_policy_weight, self.nll_weight)
        if self.teacher_thoughts_per_token is not None:
            check_count("teacher_thoughts_per_token", self.teacher_thoughts_per_token, least=1)
        check_count("max_length", self.max_length, least=2)
        prepare_arguments(self)
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


def teacher_nlls(
    teacher: QuietStarForCausalLM,
    dataset: Any,
    *,
    seed: int,
    epoch: int = 0,
    thoughts_per_token: int | None = None,
    batch_size: int = 8,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """What `NextTokenTrainer` needs of a teacher, but for "kl": NLLs of each text's tokens but the first, in nats.

    The thoughts are those of an online teacher in that epoch of a run with that seed; with batches of the same texts
    the NLLs are the same bits. Give them to the trainer as a column:

    >>> nlls = teacher_nlls(teacher, dataset, seed=0, path="nlls.safetensors")  # doctest: +SKIP
    >>> dataset = dataset.add_column("teacher_nlls", nlls)  # doctest: +SKIP

    Args:
        dataset: of dicts with `input_ids` and, if need be, `attention_mask`; no text is cropped.
        path: a safetensors file in which finished texts are kept, every minute and at an interruption; what it holds
            of the same teacher and options already is not made again.

    Returns:
        float32 arrays [T - 1], one for each text without its padding.

    Raises:
        ValueError, TypeError: as `think_at_every_token`; the file at `path` is of something else.
    """
    texts, collate = NumberedTexts(dataset), TextCollator(max_length=sys.maxsize)
    about = {} if path is None else _about(teacher, texts, seed, epoch, thoughts_per_token)
    done = _read(path, about) if path is not None and Path(path).exists() else []
    options = (epoch_seed(seed, epoch), thoughts_per_token, 1.0, None, None)
    saved = time.monotonic()
    try:
        for start in tqdm(range(len(done), len(texts), batch_size), "teacher", disable=None if progress else True):
            batch = collate([texts[i] for i in range(start, min(start + batch_size, len(texts)))])
            ids, mask, sequence_ids = (
                batch[name].to(teacher.device) for name in ("input_ids", "attention_mask", "sequence_ids")
            )
            nlls = mixed_nlls(teacher, ids, mask, (*options, sequence_ids)).float().cpu().numpy()
            done += [row[: n - 1] for row, n in zip(nlls, mask.sum(1).tolist(), strict=True)]
            if path is not None and time.monotonic() - saved >= _SAVE_EVERY:
                _write(path, done, about)
                saved = time.monotonic()
    finally:
        if path is not None and done:
            _write(path, done, about)
    return done


def _about(
    teacher: QuietStarForCausalLM, texts: NumberedTexts, seed: int, epoch: int, thoughts: int | None
) -> dict[str, str]:
    """What a file of NLLs is of."""
    ids = hashlib.sha256()
    for i in range(len(texts)):
        example = texts[i]
        row = np.asarray(example["input_ids"], np.int64)
        if example.get("attention_mask") is not None:
            row = row[np.asarray(example["attention_mask"], bool)]
        ids.update(np.int64(len(row)).tobytes() + row.tobytes())
    thoughts = teacher.config.thoughts_per_token if thoughts is None else thoughts
    options = (seed, epoch, thoughts, teacher.config.thought_tokens)
    names = ("seed", "epoch", "thoughts_per_token", "thought_tokens", "teacher", "dataset")
    return dict(zip(names, (*map(str, options), fingerprint(teacher), ids.hexdigest()), strict=True))


def _write(path: str | os.PathLike[str], done: list[Any], about: dict[str, str]) -> None:
    lengths = np.array([len(row) for row in done])
    with replacing(path) as partial:
        save_file({"nlls": np.concatenate(done), "lengths": lengths}, partial, about)


def _read(path: str | os.PathLike[str], about: dict[str, str]) -> list[Any]:
    with safe_open(path, "np") as file:
        if (found := file.metadata()) != about:
            wrong = [name for name in about if (found or {}).get(name) != about[name]]
            raise ValueError(f"path: {path} holds NLLs of another {', '.join(wrong)}; remove it or name another file")
        nlls, lengths = file.get_tensor("nlls"), file.get_tensor("lengths")
    return np.split(nlls, lengths.cumsum()[:-1])


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
