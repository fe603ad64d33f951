"""Quiet-STaR (arXiv 2403.09629): language models that think after every token before they predict the next."""

from importlib import import_module
from typing import Any

from pyquiet.quiet_star.configuration import QuietStarConfig
from pyquiet.quiet_star.conversion import convert_released, load_released
from pyquiet.quiet_star.generation import GeneratedThoughts, QuietStarGenerateOutput
from pyquiet.quiet_star.modeling import QuietStarForCausalLM, Thoughts
from pyquiet.quiet_star.objective import QuietStarObjective, ThinkingLoss

__all__ = [
    "GeneratedThoughts",
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
]

_TRAINING = {"QuietStarTrainer": "trainer", "QuietStarTrainingArguments": "arguments"}


def __getattr__(name: str) -> Any:
    """The trainers, imported when they are asked for: transformers' Trainer brings accelerate and more along."""
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_TRAINING[name]}"), name)
