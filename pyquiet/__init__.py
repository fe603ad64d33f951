"""Hugging Face language models that think before they speak, on native kernels."""

from typing import Any

from pyquiet import quiet_star
from pyquiet.quiet_star import QuietStarConfig, QuietStarForCausalLM, QuietStarObjective
from pyquiet.zoo import load

__version__ = "0.1.0"
__all__ = [
    "NextTokenTrainer",
    "NextTokenTrainingArguments",
    "QuietStarConfig",
    "QuietStarForCausalLM",
    "QuietStarObjective",
    "QuietStarTrainer",
    "QuietStarTrainingArguments",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(quiet_star, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
