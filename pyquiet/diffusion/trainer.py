"""transformers' Trainer for denoisers of masked diffusion (arXiv 2406.07524) and for energies (arXiv 2410.21357)."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction

from pyquiet.datasets import TextCollator
from pyquiet.diffusion.arguments import DiffusionTrainingArguments, NCETrainingArguments
from pyquiet.diffusion.ema import AveragingTrainer
from pyquiet.diffusion.modeling import MaskedDenoiser, as_denoiser, longest_text
from pyquiet.diffusion.nce_energy import NCEEnergy
from pyquiet.diffusion.training import DenoiserLearner, Masks, completions, nce_loss, nelbo, random_masks
from pyquiet.trainers import check_trainable, evenly_spread, text_in, tokens_in

_BINS = 4  # of time, in which an energy's calibration is watched
_LARGEST = 300.0  # of -E in a mean of exp(-E), far beyond what means anything, and far from overflow


class NoiseTrainer(AveragingTrainer):
    """What the trainers of denoisers and energies share: how texts are noised."""

    collator = TextCollator

    def _refuse(self, args: Any, kind: type) -> None:
        if not isinstance(args, kind):
            raise TypeError(f"args must be {kind.__name__}, got {type(args).__name__}")
        for name in ("fsdp", "deepspeed"):
            if getattr(args, name):
                raise ValueError(f"args: {name} is not supported, as the weights are averaged whole; leave it out")

    def _check_context(self, args: Any, *contexts: int | None) -> None:
        """Raises ValueError where texts of max_length are longer than what one of the models was made for."""
        most = min((context for context in contexts if context is not None), default=args.max_length)
        if args.max_length > most:
            raise ValueError(f"args: max_length={args.max_length} is more than the {most} that the model was made for")

    @property
    def _objective(self) -> str:
        """How texts are masked, see `random_masks`."""
        return "continuous"

    def _masks(self, level: Tensor, inputs: dict[str, Any], seed: int) -> Masks:
        """What is masked at these levels of noise [B]."""
        args, ids = self.args, inputs["sequence_ids"]
        options: dict[str, Any] = {"objective": self._objective, "schedule": args.schedule, "min_time": args.min_time}
        return random_masks(level, seed=seed, sequence_ids=ids, **(options | text_in(inputs)))

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
        ValueError: a trainable weight is in half precision; texts of max_length do not fit into the model's context;
            FSDP, DeepSpeed; several GPUs in one process.
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
        self._check_context(args, self.denoiser.context)
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)

    def _level(self, u: Tensor) -> Tensor:
        low, high = self.args.levels(self.state.global_step)
        return low + (high - low) * u

    @property
    def _objective(self) -> str:
        return self.args.objective

    def _counts(self, inputs: dict[str, Any]) -> Tensor:
        return tokens_in(inputs)

    def _loss(self, model: Any, inputs: dict[str, Any], counts: Tensor | None) -> tuple[Tensor, Any]:
        masked, weight = inputs["masked"], inputs["weight"]
        out = model(**text_in(inputs), masked=masked, weight=weight, token_count=counts)
        tokens = tokens_in(inputs)
        self.meter.add({"nelbo": out.loss.detach(), "tokens": tokens}, joint=counts is not None)
        self.meter.add({"masked_fraction": masked.sum() / tokens}, joint=False)
        return out.loss, out

    def _learner(self) -> nn.Module:
        return DenoiserLearner(self.denoiser)

    def _evaluated(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and the NELBO and the tokens of each text, [B, 2]."""
        masks = self._evaluation_masks(inputs)
        with self.accelerator.autocast():
            out = nelbo(self.denoiser, **text_in(inputs), masked=masks.masked, weight=masks.weight)
        ids = inputs["input_ids"]
        tokens = inputs.get("attention_mask", torch.ones_like(ids)).sum(1)
        sums = torch.stack([out.text.double(), tokens.double()], 1)
        return out.loss, sums, inputs["sequence_ids"]

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The NELBO over all tokens, its standard error over the texts, and the perplexity that it bounds."""
        text, tokens = torch.from_numpy(prediction.predictions).double().unbind(1)
        bound = (text.sum() / tokens.sum()).item()
        error = (text - bound * tokens).square().sum().sqrt() / tokens.sum()
        return {"nelbo": bound, "nelbo_error": error.item(), "perplexity": math.exp(min(bound, 700.0))}


class NCETrainer(NoiseTrainer):
    """Trains an energy to tell texts from a denoiser's completions; everything else is as in `transformers.Trainer`.

    A text is noised as for the denoiser, at a time uniform in [min_time, 1], and completed `negatives` times by the
    denoiser, which is frozen, in evaluation mode and without autocast, so that it proposes what it will in sampling.
    Noise and completions depend on (seed, epoch, index of the example) and the time on (seed, step, place in the step).
    Logs, besides Trainer's own (the loss is that of a text, `nce_loss`; 2 log 2 for an energy of 0 and one negative):

    - accuracy: how often a completion has a higher energy than its text; 1/2 where they are the same;
    - log_z_25, log_z_50, log_z_75, log_z_100: log of the mean of exp(-E) over completions at times up to 0.25, 0.5, ...
      It is 0 of the energy to be learned, which is normalised by itself.

    Evaluation and `save_model` use the moving average of the weights. Evaluation, on noise of its own that never
    changes, reports the same: eval_loss, eval_accuracy, eval_log_z_25, ..., and eval_log_z of all times.

    Args:
        model: an `NCEEnergy`; `NCEEnergy.from_denoiser` makes the one to begin with.
        args: NCETrainingArguments.
        data_collator, train_dataset, eval_dataset: as for `DiffusionTrainer`.
        denoiser: whose completions are the negatives, as `as_denoiser` takes it. It is not trained.

    Raises:
        TypeError: the model is no NCEEnergy, or args are plain TrainingArguments.
        ValueError: the two have different mask tokens; a trainable weight is in half precision; texts of max_length do
            not fit into one's context; FSDP, DeepSpeed; several GPUs in one process.
    """

    args: NCETrainingArguments

    def __init__(
        self,
        model: NCEEnergy,
        args: NCETrainingArguments,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        denoiser: Any,
        **kwargs: Any,
    ) -> None:
        self._refuse(args, NCETrainingArguments)
        if not isinstance(model, NCEEnergy):
            raise TypeError(f"model must be an NCEEnergy, got {type(model).__name__}; see NCEEnergy.from_denoiser")
        self.denoiser = as_denoiser(denoiser)
        if model.mask_id != self.denoiser.mask_id:
            raise ValueError(f"the energy's mask token is {model.mask_id}, the denoiser's {self.denoiser.mask_id}")
        check_trainable(model, args)
        self._check_context(args, longest_text(model.trunk), getattr(self.denoiser, "context", None))
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        if isinstance(self.denoiser, nn.Module):
            self.denoiser.to(args.device)

    def _counts(self, inputs: dict[str, Any]) -> Tensor:
        return torch.tensor(len(inputs["input_ids"]), device=inputs["input_ids"].device)

    def _energies(self, model: Any, inputs: dict[str, Any], masked: Tensor, time: Tensor, seed: int) -> Tensor:
        """Of each text and its completions, [B, 1 + nu]."""
        text, ids = text_in(inputs), inputs["input_ids"]
        masked = masked.to(ids.device)
        with torch.autocast(ids.device.type, enabled=False):
            negatives = completions(
                self.denoiser, **text, masked=masked, count=self.args.negatives, seed=seed,
                sequence_ids=inputs["sequence_ids"],
            )  # fmt: skip
        candidates = torch.cat([ids[:, None], negatives], 1)
        noisy = ids.masked_fill(masked, self.denoiser.mask_id)
        out: Tensor = model(candidates, noisy, time, attention_mask=text.get("attention_mask"))
        return out

    def _loss(self, model: Any, inputs: dict[str, Any], counts: Tensor | None) -> tuple[Tensor, Tensor]:
        energies = self._energies(model, inputs, inputs["masked"], inputs["time"], self.training_seed)
        positive, negative = energies[:, 0], energies[:, 1:]
        count = len(energies) if counts is None else counts
        loss = nce_loss(positive, negative).sum() / count
        found = energies.detach().double()
        parts = {"accuracy": _accuracy(found).sum() / count, "tokens": tokens_in(inputs)}
        self.meter.add(parts, joint=counts is not None)
        for name, part in _by_time(inputs["time"].to(found.device)).items():
            mean = (-found[part, 1:]).clamp(max=_LARGEST).exp().mean() if part.any() else found.new_zeros(())
            self.meter.add({name: mean}, joint=False, known=bool(part.any()))
        return loss, energies

    def _readings(self, means: dict[str, float]) -> dict[str, float]:
        return {name: math.log(x) if name.startswith("log_z") else x for name, x in means.items()}

    def _evaluated(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The mean loss, and the time and the energies of each text and its completions, [B, 2 + nu]."""
        masks = self._evaluation_masks(inputs)
        with self.accelerator.autocast():
            energies = self._energies(self.model, inputs, masks.masked, masks.time, self.evaluation_seed)
        loss = nce_loss(energies[:, 0], energies[:, 1:]).mean()
        found = torch.cat([masks.time.to(energies.device)[:, None], energies.double()], 1)
        return loss, found, inputs["sequence_ids"]

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The accuracy, and log Z by time, over all texts."""
        time, energies = torch.from_numpy(prediction.predictions).double().split([1, 1 + self.args.negatives], 1)
        found = {"accuracy": _accuracy(energies).mean().item(), "log_z": _log_z(energies)}
        parts = _by_time(time[:, 0]).items()
        return found | {name: _log_z(energies[part]) for name, part in parts if part.any()}


def _accuracy(energies: Tensor) -> Tensor:
    """The share [B] of completions with a higher energy than their text; [B, 1 + nu]. Equal ones count half."""
    gap = energies[:, 1:] - energies[:, :1]
    right: Tensor = ((gap.sign() + 1) / 2).mean(1)
    return right


def _log_z(energies: Tensor) -> float:
    """log mean exp(-E) of completions, of energies [B, 1 + nu]."""
    negative = energies[:, 1:].flatten()
    return float((-negative).logsumexp(0)) - math.log(len(negative))


def _by_time(time: Tensor) -> dict[str, Tensor]:
    """Which texts [B] are in which quarter of time; by the name of its calibration."""
    place = (time * _BINS).ceil().clamp(1, _BINS)
    return {f"log_z_{100 * i // _BINS}": place == i for i in range(1, _BINS + 1)}
