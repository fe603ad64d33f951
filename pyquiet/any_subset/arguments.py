"""The training arguments of `AnySubsetTrainer`: those of transformers, how much is masked and what is learned."""

from dataclasses import dataclass, field

from pyquiet.any_subset.training import BLOCK_SIZES
from pyquiet.checks import check_count, check_fraction
from pyquiet.trainers import SeededArguments


@dataclass
class AnySubsetTrainingArguments(SeededArguments):
    """`transformers.TrainingArguments` and how a model learns to fill in; see `any_subset_loss`.

    The share of a text that is to be filled is uniform in [low_mask_rate, high_mask_rate], evenly spread over the texts
    of a step. Both ends start at `start_mask_rate` and move in a straight line over the first `mask_warmup_steps`.

    Raises:
        ValueError, TypeError: an option is out of range.
    """

    draft_weight: float = field(default=0.5, metadata={"help": "Of the drafts' NLL; the joint law has the rest."})
    low_mask_rate: float = field(default=0.15, metadata={"help": "The smallest share of a text to be filled."})
    high_mask_rate: float = field(default=0.95, metadata={"help": "The largest."})
    start_mask_rate: float | None = field(default=None, metadata={"help": "Both at first; None: low_mask_rate."})
    mask_warmup_steps: int = field(default=0, metadata={"help": "Steps from there to the range."})
    smallest_block: int = field(default=BLOCK_SIZES[0], metadata={"help": "Of targets drafted together."})
    largest_block: int = field(default=BLOCK_SIZES[1], metadata={"help": "Of targets drafted together."})
    eval_mask_rates: list[float] = field(default_factory=lambda: [0.5, 0.95])

    def __post_init__(self) -> None:
        for name in ("draft_weight", "low_mask_rate", "high_mask_rate"):
            check_fraction(name, getattr(self, name))
        if self.start_mask_rate is not None:
            check_fraction("start_mask_rate", self.start_mask_rate)
        if not self.low_mask_rate <= self.high_mask_rate:
            raise ValueError(
                f"low_mask_rate must be at most high_mask_rate, got {self.low_mask_rate} and {self.high_mask_rate}"
            )
        check_count("mask_warmup_steps", self.mask_warmup_steps, least=0)
        check_count("smallest_block", self.smallest_block, least=1)
        check_count("largest_block", self.largest_block, least=self.smallest_block)
        if not self.eval_mask_rates:
            raise ValueError("eval_mask_rates must hold a rate to evaluate at, got []")
        for rate in self.eval_mask_rates:
            check_fraction("eval_mask_rates", rate)
        super().__post_init__()

    def mask_rates(self, step: int) -> tuple[float, float]:
        """The ends of the range of rates at the step of this number, from 0."""
        done = min(1.0, step / self.mask_warmup_steps) if self.mask_warmup_steps else 1.0
        start = self.low_mask_rate if self.start_mask_rate is None else self.start_mask_rate
        return start + (self.low_mask_rate - start) * done, start + (self.high_mask_rate - start) * done
