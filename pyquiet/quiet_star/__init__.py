"""Quiet-STaR (arXiv 2403.09629): language models that think after every token before they predict the next."""

from importlib import import_module
from typing import Any

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

_TRAINING = {
    "NextTokenTrainer": "next_token",
    "NextTokenTrainingArguments": "next_token",
    "QuietStarTrainer": "trainer",
    "QuietStarTrainingArguments": "arguments",
    "teacher_nlls": "next_token",
}


def __getattr__(name: str) -> Any:
    """The trainers, imported when they are asked for: transformers' Trainer brings accelerate and more along."""
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_TRAINING[name]}"), name)
