"""`AnySubsetTrainer`: transformers' Trainer for models that fill in any part of a text (arXiv 2504.20456)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from pyquiet.any_subset.arguments import AnySubsetTrainingArguments
from pyquiet.any_subset.modeling import XLNetEngine
from pyquiet.any_subset.training import SubsetLearner, random_blocks, random_order, subset_scores
from pyquiet.datasets import TextCollator
from pyquiet.trainers import SeededTrainer, check_trainable, text_in, tokens_in

REACH = 3  # drafts behind the exact one that evaluation looks at
_NOISE = ("order", "prompt", "block_size", "block_offset")


class AnySubsetTrainer(SeededTrainer):
    """Trains an XLNetLMHeadModel to fill in; everything not said here is as in `transformers.Trainer`.

    Which part of a text is to be filled depends on (seed, epoch, index of the example) and its share on (seed, step,
    place in the step): not on the cut into micro-batches, the number of processes or whether the run was resumed. The
    loss of a step is that of the joint batch over micro-batches and processes. Logs, besides Trainer's own: joint_nll
    and draft_nll (nats a target), masked_fraction, tokens_per_second (of text, all processes).

    Evaluation, on parts of its own that never change, reports for each of `eval_mask_rates`, here 50 %:
    eval_joint_nll_50, nats a target of the joint law, and eval_acceptance_50_1 .. 3, how likely drafts of the ranks
    after an exact one are to be accepted, the text given; eval_loss is the mean joint NLL of the rates.

    Args:
        model: transformers' XLNetLMHeadModel.
        args: AnySubsetTrainingArguments.
        data_collator: None is `pyquiet.datasets.TextCollator` with the arguments' max_length and seed.
        train_dataset, eval_dataset: of dicts with `input_ids` and, if need be, `attention_mask`; `packed` makes them.

    Raises:
        TypeError: the model is another, or args are plain TrainingArguments.
        ValueError: a trainable weight is in half precision; FSDP, DeepSpeed, gradient checkpointing; several GPUs in
            one process.
    """

    args: AnySubsetTrainingArguments
    collator = TextCollator

    def __init__(
        self,
        model: Any,
        args: AnySubsetTrainingArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, AnySubsetTrainingArguments):
            raise TypeError(f"args must be AnySubsetTrainingArguments, got {type(args).__name__}")
        XLNetEngine(model)  # refuses others
        check_trainable(model, args)
        for name in ("fsdp", "deepspeed", "gradient_checkpointing"):
            if getattr(args, name):
                raise ValueError(
                    f"args: {name} is not supported, as the layers' own forwards are not used; leave it out"
                )
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)

    # -- one step

    def _draw_noise(self, batches: list[dict[str, Any]]) -> None:
        args = self.args
        low, high = args.mask_rates(self.state.global_step)
        for number, batch in enumerate(batches):
            u = self.strata(number, batch)
            seed, ids = self.training_seed, batch["sequence_ids"]
            order, prompt = random_order(low + (high - low) * u, **text_in(batch), seed=seed, sequence_ids=ids)
            blocks = random_blocks(ids, seed=seed, sizes=(args.smallest_block, args.largest_block))
            batch.update(zip(_NOISE, (order, prompt, *blocks), strict=True))

    def _counts(self, inputs: dict[str, Any]) -> Tensor:
        tokens, prompt = tokens_in(inputs), inputs["prompt"]
        targets: Tensor = tokens - prompt.sum().to(tokens.device)
        return targets

    def _loss(self, model: Any, inputs: dict[str, Any], counts: Tensor | None) -> tuple[Tensor, Any]:
        noise = {name: inputs[name] for name in _NOISE}
        out = model(**text_in(inputs), **noise, draft_weight=self.args.draft_weight, target_count=counts)
        parts = {"joint_nll": out.joint_nll, "draft_nll": out.draft_nll}
        tokens = tokens_in(inputs)
        known = {name: part.detach() for name, part in parts.items() if part is not None}
        self.meter.add({**known, "tokens": tokens}, joint=counts is not None)
        self.meter.add({"masked_fraction": self._counts(inputs) / tokens}, joint=False)
        return out.loss, out

    def _learner(self) -> nn.Module:
        return SubsetLearner(self.model)

    # -- evaluation

    def _evaluated(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The mean joint NLL, and the scores [B, rates, 2 + 2 REACH] of the texts at the fixed rates."""
        text, scores, ids = text_in(inputs), [], inputs["sequence_ids"]
        for rate in self.args.eval_mask_rates:
            share = torch.full((len(ids),), rate)
            order, prompt = random_order(share, **text, seed=self.evaluation_seed, sequence_ids=ids)
            with self.accelerator.autocast():
                out = subset_scores(self.model, **text, order=order, prompt=prompt, reach=REACH)
            scores.append(torch.cat([out.joint_nll[:, None], out.targets[:, None], out.acceptance, out.drafts], 1))
        sums = torch.stack(scores, 1)
        return (sums[..., 0].sum(0) / sums[..., 1].sum(0)).mean(), sums, ids

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The joint NLL and the acceptance of drafts at each rate, over all targets."""
        sums = torch.from_numpy(prediction.predictions).double().sum(0)  # [rates, 2 + 2 REACH]
        found = {}
        for rate, (nll, targets, *drafts) in zip(self.args.eval_mask_rates, sums.tolist(), strict=True):
            name = f"{100 * rate:g}"
            found[f"joint_nll_{name}"] = nll / targets
            for j in range(REACH):
                if drafts[REACH + j]:
                    found[f"acceptance_{name}_{j + 1}"] = drafts[j] / drafts[REACH + j]
        return found
