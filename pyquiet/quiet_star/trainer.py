"""`QuietStarTrainer`: transformers' Trainer for models that learn to think (arXiv 2403.09629, section 4)."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainerCallback

from pyquiet.quiet_star.arguments import QuietStarTrainingArguments, Stage
from pyquiet.quiet_star.data import QuietStarCollator, numbered
from pyquiet.quiet_star.inputs import IGNORED, check_context
from pyquiet.quiet_star.modeling import QuietStarForCausalLM
from pyquiet.quiet_star.objective import ThinkingLoss
from pyquiet.randomness import epoch_seed

DECILES = 10
_EVALUATION = 2**32 - 1  # the epoch whose noise evaluation draws from
_HEAD, _META = "mixing_head.", ("start_embedding", "end_embedding")


class QuietStarTrainer(Trainer):
    """Trains a `QuietStarForCausalLM`; everything not said here is as in `transformers.Trainer`.

    Noise and crops depend on (seed, epoch, index of the example) alone: not on the batch, the number of processes or
    whether the run was resumed. The loss of a step is that of the joint batch over micro-batches and processes, but
    with `official=True`, where each has its own means, as in the released code. Logs, besides Trainer's own:

    - base_nll, mixed_nll (nats a token; mixed over all A tokens after a thought), policy, reward (nats a thought),
      weight_mean and weight_std of w, thought_entropy (nats a thought token), tokens_per_second (of text, all
      processes);
    - gain, base NLL minus mixed NLL of the next token in nats, and gain_decile_1 .. gain_decile_10, the same over the
      tenths of the tokens of a micro-batch by base NLL. The hardest tenth is chosen by the loss that is compared, so
      part of its gain is regression to the mean; `pyquiet.evaluation` chooses by entropy.

    Evaluation, on noise and crops of its own that never change, reports eval_loss, eval_base_nll, eval_mixed_nll (the
    next token's, thoughts averaged in probability), eval_gain and eval_gain_decile_1 .. 10.

    Args:
        model: the thinking model, or one in PEFT's wrapping. Adapters on its base: see docs/quiet_star.md.
        args: QuietStarTrainingArguments.
        data_collator: None is `QuietStarCollator` with the arguments' max_length and seed.
        train_dataset, eval_dataset: of dicts with `input_ids` and, if need be, `attention_mask` and `labels`.

    Raises:
        TypeError: the model does not think, or args are plain TrainingArguments.
        ValueError: a trainable weight is in half precision; texts of max_length do not fit into the model's context;
            several GPUs in one process.
    """

    args: QuietStarTrainingArguments

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
        thinker = _thinker_in(model)
        _check_trainable(thinker, args)
        self.seed = args.seed if args.data_seed is None else args.data_seed
        self.objective = args.objective
        self.stages = args.stages
        self._meter = _Meter()
        tokenizer = kwargs.get("processing_class")
        pad = getattr(tokenizer, "pad_token_id", None) or 0
        kwargs.setdefault("compute_metrics", thinking_metrics)
        super().__init__(
            model,
            args,
            data_collator or QuietStarCollator(args.max_length, self.seed, pad),
            numbered(train_dataset),
            numbered(eval_dataset),
            **kwargs,
        )
        self.model_accepts_loss_kwargs = True  # the loss is that of the joint batch
        self.add_callback(_Epochs(self))

    # -- one step

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of an optimiser step, and what the means of their joint batch divide by."""
        self._enter_stage()
        self._meter.begin_step()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.objective.official or not batches:
            return batches, None
        counts = torch.stack([self._counts(batch) for batch in batches]).sum(0).to(device)
        return batches, self.accelerator.reduce(counts, "sum")

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch, scaled so that the mean of its gradients over processes is the joint one's."""
        seed = epoch_seed(self.seed, int(self.state.epoch or 0))
        out = self._think(model, inputs, seed, num_items_in_batch)
        joint = num_items_in_batch is not None
        self._meter.add(out, self._targets(inputs), inputs, joint)
        loss = out.loss * self.accelerator.num_processes if joint else out.loss
        return (loss, out) if return_outputs else loss

    def _think(self, model: Any, inputs: dict[str, Any], seed: int, counts: Tensor | None) -> ThinkingLoss:
        inputs = {name: x for name, x in inputs.items() if name in _INPUTS}
        out: ThinkingLoss = model(**inputs, objective=self.objective, seed=seed, target_counts=counts)
        return out

    def _counts(self, inputs: dict[str, Any]) -> Tensor:
        return self.objective.target_counts(inputs["input_ids"], inputs.get("attention_mask"), inputs.get("labels"))

    def _targets(self, inputs: dict[str, Any]) -> Tensor:
        """bool [B, C]: the next token is to be predicted."""
        ids, mask, labels = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("labels")
        targets = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        targets = targets[:, 1:] & targets[:, :-1]
        return targets if labels is None else targets & (labels[:, 1:] != IGNORED)

    # -- a run

    def _enter_stage(self) -> None:
        step = self.state.global_step
        for stage in self.stages:
            if step < stage.steps:
                _thinker_in(self.accelerator.unwrap_model(self.model)).config.thought_tokens = stage.thought_tokens
                self.objective = replace(self.objective, lookahead=stage.lookahead)
                return
            step -= stage.steps

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

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's, with what the class says added to the training loss."""
        if "loss" in logs:
            logs.update(self._meter.read(self.accelerator))
        super().log(logs, *args, **kwargs)

    # -- evaluation

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """The loss, NLLs [B, C] of the next token without and with thoughts, and that token (-100: none)."""
        inputs = self._prepare_inputs(inputs)
        counts = None if self.objective.official else self._counts(inputs)
        out = self._think(model, inputs, epoch_seed(self.seed, _EVALUATION), counts)
        if prediction_loss_only:
            return out.loss, None, None
        mixed = -((-out.mixed_nlls[..., 0]).logsumexp(-1) - math.log(out.mixed_nlls.shape[2]))
        labels = inputs["input_ids"][:, 1:].masked_fill(~self._targets(inputs), IGNORED)
        return out.loss, (out.base_nlls, mixed), labels


_INPUTS = ("input_ids", "attention_mask", "labels", "sequence_ids")


def thinking_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Mean NLLs and gains in nats, over all tokens and by tenths of base NLL, of `QuietStarTrainer`'s predictions."""
    keep = torch.from_numpy(prediction.label_ids) != IGNORED
    base, mixed = (torch.from_numpy(nlls)[keep].double() for nlls in prediction.predictions)
    means = {"base_nll": base.mean(), "mixed_nll": mixed.mean(), "gain": (base - mixed).mean()}
    return {name: x.item() for name, x in {**means, **decile_gains(base, base - mixed)}.items()}


def decile_gains(base: Tensor, gain: Tensor) -> dict[str, Tensor]:
    """The mean of the gains [n] over each tenth of the tokens by base NLL [n]; nothing for fewer than ten tokens."""
    if len(base) < DECILES:
        return {}
    parts = gain[base.argsort(stable=True)].tensor_split(DECILES)
    return {f"gain_decile_{k}": part.mean() for k, part in enumerate(parts, 1)}


class _Meter:
    """Sums what the steps since the last log report, without waiting for the device."""

    def __init__(self) -> None:
        self.steps = 0
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # micro-batches that reported; those of a joint batch add up instead

    def begin_step(self) -> None:
        if not self.steps:
            self.began = time.perf_counter()
        self.steps += 1

    def add(self, out: ThinkingLoss, targets: Tensor, inputs: dict[str, Any], joint: bool) -> None:
        parts = {name: getattr(out, name).detach() for name in ("base_nll", "mixed_nll", "policy", "reward")}
        local = {name: getattr(out, name).detach() for name in ("weight_mean", "weight_std", "thought_entropy")}
        base = out.base_nlls[targets]
        gain = base - out.mixed_nlls[..., 0].mean(-1)[targets]
        local |= {"gain": gain.sum() / max(1, len(gain)), **decile_gains(base, gain)}
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].new_tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
        self._sum({**parts, "tokens": tokens}, 0 if joint else 1)
        self._sum(local, 1)

    def _sum(self, values: dict[str, Tensor], count: int) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.double()
            self.counts[name] = self.counts.get(name, 0) + count

    def read(self, accelerator: Any) -> dict[str, float]:
        """Means over the steps and over all processes; starts anew."""
        names = sorted(self.sums)
        if not names:
            return {}
        device = self.sums[names[0]].device
        sums = accelerator.reduce(torch.stack([self.sums[name] for name in names]), "sum").tolist()
        counts = accelerator.reduce(torch.tensor([self.counts[name] for name in names], device=device), "sum").tolist()
        totals = dict(zip(names, sums, strict=True))
        tokens = totals.pop("tokens")
        means = {
            name: totals[name] / (count or self.steps)
            for name, count in zip(names, counts, strict=True)
            if name != "tokens"
        }
        means["tokens_per_second"] = tokens / (time.perf_counter() - self.began)
        self.__init__()  # type: ignore[misc]
        return means


class _Epochs(TrainerCallback):
    """Tells the training data the epoch, from which its crops are drawn."""

    def __init__(self, trainer: QuietStarTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.train_dataset.set_epoch(int(state.epoch or 0))


def _thinker_in(model: Any) -> QuietStarForCausalLM:
    """The thinking model, out of PEFT's wrapping if it has one; TypeError if there is none."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, QuietStarForCausalLM):
        raise TypeError(
            f"model must be a QuietStarForCausalLM, got {type(model).__name__}; wrap it with "
            "QuietStarForCausalLM.from_base"
        )
    return inner


def _check_trainable(thinker: QuietStarForCausalLM, args: QuietStarTrainingArguments) -> None:
    for name, parameter in thinker.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"model: the trainable weight {name} is {parameter.dtype}, in which small steps are lost; load the "
                "model in float32 (dtype=torch.float32) and set bf16=True in args to compute in bfloat16"
            )
    stages = args.stages or [Stage(thinker.config.thought_tokens, args.lookahead, 1)]
    for stage in stages:
        check_context(thinker.config, args.max_length, stage.thought_tokens)
    if args.n_gpu > 1:
        raise ValueError(
            "args: several GPUs in one process; launch with torchrun, or show it one (CUDA_VISIBLE_DEVICES)"
        )
