"""The training arguments of `DiffusionTrainer` and `NCETrainer`: those of transformers, the noise and the average."""

from dataclasses import dataclass, field

from pyquiet.checks import check_count, check_fraction, check_word
from pyquiet.diffusion.schedule import Schedule
from pyquiet.diffusion.training import MIN_TIME, OBJECTIVES
from pyquiet.trainers import SeededArguments


@dataclass
class NoiseArguments(SeededArguments):
    """`transformers.TrainingArguments`, and what trainings with noised texts share."""

    noise_schedule: str = field(default="linear", metadata={"help": "As `Schedule` names it."})
    min_time: float = field(default=MIN_TIME, metadata={"help": "The smallest time that a text is noised to."})
    ema_decay: float = field(default=0.999, metadata={"help": "Of the average of the weights; 0: no average."})

    def __post_init__(self) -> None:
        self.schedule = Schedule(self.noise_schedule)
        if not 0 < check_fraction("min_time", self.min_time) < 1:
            raise ValueError(f"min_time must be in (0, 1), got {self.min_time}")
        if check_fraction("ema_decay", self.ema_decay) == 1:
            raise ValueError(f"ema_decay must be below 1, where the average would never move, got {self.ema_decay}")
        super().__post_init__()


@dataclass
class DiffusionTrainingArguments(NoiseArguments):
    """`transformers.TrainingArguments` and how a denoiser learns; see `random_masks`.

    Levels of noise are uniform in [0, 1). Both ends of this range start at `start_level` and move in a straight line
    over the first `level_warmup_steps`: a fresh model learns to look at a token's neighbours much sooner where most of
    them are there (0.15). The loss of these steps is no bound.

    Raises:
        ValueError, TypeError: an option is out of range.
    """

    objective: str = field(default=OBJECTIVES[0], metadata={"help": "continuous, or the same with less variance."})
    start_level: float = field(default=0.15, metadata={"help": "Of noise, in the first step of the warm-up."})
    level_warmup_steps: int = field(default=0, metadata={"help": "Steps from there to all levels."})

    def __post_init__(self) -> None:
        check_word("objective", self.objective, OBJECTIVES)
        check_fraction("start_level", self.start_level)
        check_count("level_warmup_steps", self.level_warmup_steps, least=0)
        super().__post_init__()

    def levels(self, step: int) -> tuple[float, float]:
        """The ends of the range of levels at the step of this number, from 0."""
        done = min(1.0, step / self.level_warmup_steps) if self.level_warmup_steps else 1.0
        return self.start_level * (1 - done), self.start_level + (1 - self.start_level) * done


@dataclass
class NCETrainingArguments(NoiseArguments):
    """`transformers.TrainingArguments` and how an energy learns; see `nce_loss`.

    Raises:
        ValueError, TypeError: an option is out of range.
    """

    negatives: int = field(default=1, metadata={"help": "Completions by the denoiser beside each text."})

    def __post_init__(self) -> None:
        check_count("negatives", self.negatives, least=1)
        super().__post_init__()
