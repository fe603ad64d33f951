"""The training arguments of `QuietStarTrainer`: those of transformers, the objective's and a curriculum."""

import math
from dataclasses import dataclass, field, fields

from pyquiet.checks import check_count, check_weight
from pyquiet.quiet_star.objective import Baseline, QuietStarObjective, Reduction
from pyquiet.trainers import SeededArguments


@dataclass(frozen=True)
class Stage:
    """A stage of the curriculum of Fast Quiet-STaR (arXiv 2505.17746): m, A, optimiser steps, peak learning rate."""

    thought_tokens: int
    lookahead: int
    steps: int
    learning_rate: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Stage":
        """The stage written "m,A:steps" or "m,A:steps:learning_rate", e.g. "13,8:150:2e-6"."""
        try:
            sizes, steps, *rate = text.split(":")
            thought_tokens, lookahead = (int(size) for size in sizes.split(","))
            if len(rate) > 1:
                raise ValueError
            stage = cls(thought_tokens, lookahead, int(steps), float(rate[0]) if rate else None)
        except ValueError:
            raise ValueError(
                f'curriculum: {text!r} is no stage; write "thought_tokens,lookahead:steps" or '
                '"thought_tokens,lookahead:steps:learning_rate", for example "13,8:150:2e-6"'
            ) from None
        check_count("curriculum: thought_tokens", stage.thought_tokens, least=0)
        check_count("curriculum: lookahead", stage.lookahead, least=1)
        check_count("curriculum: steps", stage.steps, least=1)
        if stage.learning_rate is not None and not 0 < stage.learning_rate < math.inf:
            raise ValueError(f"curriculum: the learning rate of {text!r} must be positive")
        return stage


@dataclass
class QuietStarTrainingArguments(SeededArguments):
    """`transformers.TrainingArguments` and how a model learns to think; see `QuietStarObjective` for its options.

    With `curriculum`, a list of stages "m,A:steps[:learning_rate]", one run goes through them (arXiv 2505.17746):
    START, END, the mixing head and the optimiser's state live on, the schedule goes on, and max_steps is their sum. A
    stage's learning rate scales the schedule; without one it is `learning_rate`.

    Raises:
        ValueError, TypeError: an option is out of range.
    """

    thoughts_per_token: int = field(default=2, metadata={"help": "N, thoughts after each token."})
    lookahead: int = field(default=4, metadata={"help": "A, tokens predicted after a thought."})
    base_weight: float = 0.5
    mixed_weight: float = 0.5
    policy_weight: float | None = None
    baseline: Baseline | None = None
    relu: bool | None = None
    over_steps: Reduction | None = None
    policy_temperature: float | None = None
    official: bool = field(default=False, metadata={"help": "The released code's loss, number for number."})
    head_learning_rate: float | None = field(default=None, metadata={"help": "Of the mixing head."})
    meta_learning_rate: float | None = field(
        default=None, metadata={"help": "Of START and END as stored, which is embedding_scale times smaller."}
    )
    curriculum: list[str] | None = None

    def __post_init__(self) -> None:
        _ = self.objective
        for name in ("head_learning_rate", "meta_learning_rate"):
            if (rate := getattr(self, name)) is not None:
                check_weight(name, rate)
        if isinstance(self.curriculum, str):
            raise TypeError(f"curriculum must be a list of stages, got the string {self.curriculum!r}")
        if stages := self.stages:
            total = sum(stage.steps for stage in stages)
            if self.max_steps not in (-1, total):  # type: ignore[has-type]
                raise ValueError(f"max_steps must be left out, or be the {total} steps of the curriculum's stages")
            self.max_steps = total
        super().__post_init__()
        if any(stage.learning_rate for stage in self.stages) and not self.learning_rate > 0:
            raise ValueError("learning_rate must be positive where stages of the curriculum have rates of their own")

    @property
    def objective(self) -> QuietStarObjective:
        """The objective that these arguments describe."""
        return QuietStarObjective(**{option.name: getattr(self, option.name) for option in fields(QuietStarObjective)})

    @property
    def stages(self) -> list[Stage]:
        """The curriculum's stages; none without one."""
        return [Stage.parse(stage) for stage in self.curriculum or ()]
