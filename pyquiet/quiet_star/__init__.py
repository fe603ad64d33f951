"""Quiet-STaR (arXiv 2403.09629): language models that think after every token before they predict the next."""

from pyquiet.lazy import lazily
from pyquiet.quiet_star.configuration import QuietStarConfig
from pyquiet.quiet_star.conversion import convert_released, load_released
from pyquiet.quiet_star.distillation import next_token_loss
from pyquiet.quiet_star.generation import GeneratedThoughts, QuietStarGenerateOutput
from pyquiet.quiet_star.modeling import QuietStarForCausalLM, Thoughts
from pyquiet.quiet_star.objective import QuietStarObjective, ThinkingLoss

__all__ = [
    "GeneratedThoughts",
    "NextTokenTrainer",
    "NextTokenTrainingArguments",
    "QuietStarConfig",
    "QuietStarForCausalLM",
    "QuietStarGenerateOutput",
    "QuietStarObjective",
    "QuietStarTrainer",
    "QuietStarTrainingArguments",
    "ThinkingLoss",
    "Thoughts",
    "convert_released",
    "load_released",
    "next_token_loss",
    "teacher_nlls",
]

__getattr__ = lazily(
    __name__,
    {
        "NextTokenTrainer": "next_token",
        "NextTokenTrainingArguments": "next_token",
        "QuietStarTrainer": "trainer",
        "QuietStarTrainingArguments": "arguments",
        "teacher_nlls": "teacher",
    },
)
