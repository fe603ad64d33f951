"""`QuietStarTrainer`: transformers' Trainer for models that learn to think (arXiv 2403.09629, section 4)."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction

from pyquiet.datasets import IGNORED, TextCollator
from pyquiet.evaluation import gain_by_decile
from pyquiet.quiet_star.adapters import unwrapped
from pyquiet.quiet_star.arguments import QuietStarTrainingArguments, Stage
from pyquiet.quiet_star.data import labels_in, targets_in
from pyquiet.quiet_star.inputs import check_context
from pyquiet.quiet_star.modeling import QuietStarForCausalLM
from pyquiet.quiet_star.objective import ThinkingLoss
from pyquiet.trainers import SeededTrainer, check_trainable, tokens_in

DECILES = 10
_HEAD, _META = "mixing_head.", ("start_embedding", "end_embedding")
_INPUTS = ("input_ids", "attention_mask", "labels", "sequence_ids")


def thinking_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Mean NLLs and gains in nats, over all tokens and by tenths of base NLL, of `QuietStarTrainer`'s predictions."""
    keep = torch.from_numpy(prediction.label_ids) != IGNORED
    base, mixed = (torch.from_numpy(nlls)[keep].double() for nlls in prediction.predictions)
    means = {"base_nll": base.mean(), "mixed_nll": mixed.mean(), "gain": (base - mixed).mean()}
    return {name: x.item() for name, x in {**means, **decile_gains(base, mixed)}.items()}


def decile_gains(base: Tensor, mixed: Tensor) -> dict[str, Tensor]:
    """The mean gain over each tenth of the tokens by base NLL [n], mixed NLL [n] given; nothing for fewer than ten."""
    if len(base) < DECILES:
        return {}
    gains = gain_by_decile(base, base, mixed, DECILES).gain
    return {f"gain_decile_{k}": gain for k, gain in enumerate(gains, 1)}


class QuietStarTrainer(SeededTrainer):
    """Trains a `QuietStarForCausalLM`; everything not said here is as in `transformers.Trainer`.

    Noise and crops depend on (seed, epoch, index of the example) alone: not on the batch, the number of processes or
    whether the run was resumed (streams, of unknown length, begin their epochs anew then). The loss of a step is that
    of the joint batch over micro-batches and processes, but with `official=True`, where each has its own means, as in
    the released code. Logs, besides Trainer's own:

    - base_nll, mixed_nll (nats a token; mixed over all A tokens after a thought), policy, reward (nats a thought),
      weight_mean and weight_std of w, thought_entropy (nats a thought token), tokens_per_second (of text, all
      processes);
    - gain, base NLL minus mixed NLL of the next token in nats, and gain_decile_1 .. gain_decile_10, the same over the
      tenths of the tokens of a micro-batch, of ten or more, by base NLL. The hardest tenth is chosen by the loss that
      is compared, so part of its gain is regression to the mean; `pyquiet.evaluation` chooses by entropy.

    Evaluation, on noise of its own and crops that never change, reports eval_loss, eval_base_nll, eval_mixed_nll (the
    next token's, thoughts averaged in probability), eval_gain and eval_gain_decile_1 .. 10.

    Args:
        model: the thinking model, or one in PEFT's wrapping. Adapters on its base: see docs/quiet_star.md.
        args: QuietStarTrainingArguments.
        data_collator: None is `pyquiet.datasets.TextCollator` with the arguments' max_length and seed.
        train_dataset, eval_dataset: of dicts with `input_ids` and, if need be, `attention_mask` and `labels`.

    Raises:
        TypeError: the model does not think, or args are plain TrainingArguments.
        ValueError: a trainable weight is in half precision; texts of max_length do not fit into the model's context;
            several GPUs in one process.
    """

    args: QuietStarTrainingArguments
    collator = TextCollator
    metrics = staticmethod(thinking_metrics)

    def __init__(
        self,
        model: Any,
        args: QuietStarTrainingArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, QuietStarTrainingArguments):
            raise TypeError(f"args must be QuietStarTrainingArguments, got {type(args).__name__}")
        self.thinker = _thinker_in(model)
        _check(self.thinker, args)
        self.objective = args.objective
        self.stages = args.stages
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        self._enter_stage(0)

    # -- one step

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of an optimiser step, and what the means of their joint batch divide by."""
        self._enter_stage(self.state.global_step)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _loss(self, model: Any, inputs: dict[str, Any], counts: Tensor | None) -> tuple[Tensor, ThinkingLoss]:
        out = self._think(model, inputs, self.training_seed, counts)
        self._record(out, inputs, joint=counts is not None)
        return out.loss, out

    def _think(self, model: Any, inputs: dict[str, Any], seed: int, counts: Tensor | None) -> ThinkingLoss:
        inputs = {name: x for name, x in inputs.items() if name in _INPUTS}
        options = {"objective": self.objective, "seed": seed, "target_counts": counts, "may_be_empty": True}
        out: ThinkingLoss = model(**inputs, **options)
        return out

    def _counts(self, inputs: dict[str, Any]) -> Tensor | None:
        if self.objective.official:
            return None
        return self.objective.target_counts(inputs["input_ids"], inputs.get("attention_mask"), inputs.get("labels"))

    def _record(self, out: ThinkingLoss, inputs: dict[str, Any], joint: bool) -> None:
        parts = {name: getattr(out, name).detach() for name in ("base_nll", "mixed_nll", "policy", "reward")}
        local = {name: getattr(out, name).detach() for name in ("weight_mean", "weight_std", "thought_entropy")}
        targets = targets_in(inputs)
        base, mixed = out.base_nlls[targets], out.mixed_nlls[..., 0].mean(-1)[targets]
        deciles = decile_gains(base, mixed)
        none = {f"gain_decile_{k}": base.new_zeros(()) for k in range(1, DECILES + 1)}
        self.meter.add({**parts, "tokens": tokens_in(inputs)}, joint=joint)
        self.meter.add(local, joint=False)
        gain = (base - mixed).sum() / max(1, len(base))
        self.meter.add({"gain": gain}, joint=False, known=len(base) > 0)
        self.meter.add(deciles or none, joint=False, known=bool(deciles))

    # -- a run

    def _enter_stage(self, step: int) -> None:
        """Sets m and A to those of the stage that the step of this number, from 0, is in."""
        for stage in self.stages:
            if step < stage.steps:
                self.thinker.config.thought_tokens = stage.thought_tokens
                self.objective = replace(self.objective, lookahead=stage.lookahead)
                return
            step -= stage.steps

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._enter_stage((self.state.best_global_step or 1) - 1)

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimiser; the mixing head, START and END have rates of their own where the arguments say so."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        rates = ((self.args.head_learning_rate, (_HEAD,)), (self.args.meta_learning_rate, _META))
        for rate, names in rates:
            if rate is None:
                continue
            named = (self.model if model is None else model).named_parameters()
            chosen = {id(parameter) for name, parameter in named if any(x in name for x in names)}
            for group in list(optimizer.param_groups):
                apart = [p for p in group["params"] if id(p) in chosen]
                if apart:
                    group["params"] = [p for p in group["params"] if id(p) not in chosen]
                    optimizer.add_param_group({**group, "params": apart, "lr": rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule; each stage of a curriculum scales it by its own rate."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if any(stage.learning_rate for stage in self.stages):
            scheduler = self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                scheduler.optimizer, [self._scaled(schedule) for schedule in scheduler.lr_lambdas]
            )
        return scheduler

    def _scaled(self, schedule: Any) -> Any:
        ends, total = [], 0
        for stage in self.stages:
            total += stage.steps
            ends.append((total, (stage.learning_rate or self.args.learning_rate) / self.args.learning_rate))

        def scaled(step: int) -> float:
            factor: float = next((factor for end, factor in ends if step < end), ends[-1][1])
            return factor * float(schedule(step))

        return scaled

    # -- evaluation

    def _evaluated(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        out = self._think(model, inputs, self.evaluation_seed, self._counts(inputs))
        mixed = -((-out.mixed_nlls[..., 0]).logsumexp(-1) - math.log(out.mixed_nlls.shape[2]))
        return out.loss, (out.base_nlls, mixed), labels_in(inputs)


def _thinker_in(model: Any) -> QuietStarForCausalLM:
    """The thinking model, out of PEFT's wrapping if it has one; TypeError if there is none."""
    inner = unwrapped(model)
    if not isinstance(inner, QuietStarForCausalLM):
        raise TypeError(
            f"model must be a QuietStarForCausalLM, got {type(model).__name__}; wrap it with "
            "QuietStarForCausalLM.from_base"
        )
    return inner


def _check(thinker: QuietStarForCausalLM, args: QuietStarTrainingArguments) -> None:
    check_trainable(thinker, args)
    for stage in args.stages or [Stage(thinker.config.thought_tokens, args.lookahead, 1)]:
        check_context(thinker.config, args.max_length, stage.thought_tokens)
