"""`DiffusionTrainer`: transformers' Trainer for denoisers of masked diffusion (arXiv 2406.07524)."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from pyquiet.datasets import TextCollator
from pyquiet.diffusion.arguments import DiffusionTrainingArguments
from pyquiet.diffusion.ema import AveragingTrainer
from pyquiet.diffusion.modeling import MaskedDenoiser
from pyquiet.diffusion.training import DenoiserLearner, Masks, nelbo, random_masks
from pyquiet.trainers import check_trainable, evenly_spread, tokens_in

_TEXT = ("input_ids", "attention_mask")


class NoiseTrainer(AveragingTrainer):
    """What the trainers of denoisers and energies share: how texts are noised."""

    collator = TextCollator

    def _refuse(self, args: Any, kind: type) -> None:
        if not isinstance(args, kind):
            raise TypeError(f"args must be {kind.__name__}, got {type(args).__name__}")
        for name in ("fsdp", "deepspeed"):
            if getattr(args, name):
                raise ValueError(f"args: {name} is not supported, as the weights are averaged whole; leave it out")

    def _masks(self, level: Tensor, inputs: dict[str, Any], seed: int) -> Masks:
        """What is masked at these levels of noise [B]."""
        raise NotImplementedError

    def _draw_noise(self, batches: list[dict[str, Any]]) -> None:
        for number, batch in enumerate(batches):
            level = self._level(self.strata(number, batch))
            batch.update(self._masks(level, batch, self.training_seed)._asdict())

    def _level(self, u: Tensor) -> Tensor:
        """Levels of noise [R] at the trainer's step, of uniforms."""
        return u

    def _evaluation_masks(self, inputs: dict[str, Any]) -> Masks:
        """Those of evaluation, which depend on the texts' numbers alone; the levels of many texts are evenly spread."""
        level = evenly_spread(inputs["sequence_ids"].cpu(), seed=self.evaluation_seed)
        return self._masks(level, inputs, self.evaluation_seed)

    def _text(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: inputs[name] for name in _TEXT if name in inputs}


class DiffusionTrainer(NoiseTrainer):
    """Trains a denoiser; everything not said here is as in `transformers.Trainer`.

    What is masked depends on (seed, epoch, index of the example) and how much on (seed, step, place in the step): not
    on the cut into micro-batches, the number of processes or whether the run was resumed. The loss of a step is that of
    the joint batch over micro-batches and processes. Logs, besides Trainer's own: nelbo (nats a token; the loss),
    masked_fraction, tokens_per_second (of text, all processes).

    Evaluation and `save_model` use the moving average of the weights. Evaluation, on noise of its own that never
    changes, reports eval_nelbo (nats a token), eval_perplexity = exp(eval_nelbo), and eval_nelbo_error, the standard
    error of eval_nelbo.

    Args:
        model: any Hugging Face masked language model, or a `MaskedDenoiser` around one.
        args: DiffusionTrainingArguments.
        data_collator: None is `pyquiet.datasets.TextCollator` with the arguments' max_length and seed.
        train_dataset, eval_dataset: of dicts with `input_ids` and, if need be, `attention_mask`; `packed` makes them.

    Raises:
        TypeError: the model is no denoiser, or args are plain TrainingArguments.
        ValueError: a trainable weight is in half precision; FSDP, DeepSpeed; several GPUs in one process.
    """

    args: DiffusionTrainingArguments

    def __init__(
        self,
        model: Any,
        args: DiffusionTrainingArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        self._refuse(args, DiffusionTrainingArguments)
        self.denoiser = model if isinstance(model, MaskedDenoiser) else MaskedDenoiser(model)
        model = self.denoiser.model
        check_trainable(model, args)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)

    def _level(self, u: Tensor) -> Tensor:
        low, high = self.args.levels(self.state.global_step)
        return low + (high - low) * u

    def _masks(self, level: Tensor, inputs: dict[str, Any], seed: int) -> Masks:
        args, ids = self.args, inputs["sequence_ids"]
        options: dict[str, Any] = {"objective": args.objective, "schedule": args.schedule, "min_time": args.min_time}
        return random_masks(level, **self._text(inputs), seed=seed, sequence_ids=ids, **options)

    def _counts(self, inputs: dict[str, Any]) -> Tensor:
        return tokens_in(inputs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, a part of the joint batch's where `num_items_in_batch` tells its tokens."""
        masked, weight = inputs["masked"], inputs["weight"]
        out = model(**self._text(inputs), masked=masked, weight=weight, token_count=num_items_in_batch)
        tokens = tokens_in(inputs)
        self.meter.add({"nelbo": out.loss.detach(), "tokens": tokens}, joint=num_items_in_batch is not None)
        self.meter.add({"masked_fraction": masked.sum() / tokens}, joint=False)
        loss = self.joint(out.loss, num_items_in_batch)
        return (loss, out) if return_outputs else loss

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """For training, what the accelerator makes of the module whose forward is the loss; `self.model` stays."""
        if not training or model is not self.model:
            return model
        learner: nn.Module = self.accelerator.prepare_model(DenoiserLearner(self.denoiser))
        return learner

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The loss, and the NELBO and the tokens of each text, [B, 2]."""
        inputs = self._prepare_inputs(inputs)
        masks = self._evaluation_masks(inputs)
        with self.accelerator.autocast():
            out = nelbo(self.denoiser, **self._text(inputs), masked=masks.masked, weight=masks.weight)
        ids = inputs["input_ids"]
        tokens = inputs.get("attention_mask", torch.ones_like(ids)).sum(1)
        sums = torch.stack([out.text.double(), tokens.double()], 1)
        return out.loss, None if prediction_loss_only else sums, inputs["sequence_ids"]

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The NELBO over all tokens, its standard error over the texts, and the perplexity that it bounds."""
        text, tokens = torch.from_numpy(prediction.predictions).double().unbind(1)
        bound = (text.sum() / tokens.sum()).item()
        error = (text - bound * tokens).square().sum().sqrt() / tokens.sum()
        return {"nelbo": bound, "nelbo_error": error.item(), "perplexity": math.exp(min(bound, 700.0))}
