"""Five ways to get more out of Hugging Face language models, on native kernels.

Models that think before they speak (`quiet_star`), fill in any order from the exact joint law (`any_subset`) or write
in parallel, corrected by an energy (`diffusion`); a small model that a large one helps at a promised rate (`scaling`);
an optimiser for many small problems inside a large one (`bilevel`).
"""

from importlib import import_module
from typing import Any

from pyquiet import any_subset, bilevel, diffusion, quiet_star, scaling
from pyquiet.any_subset import infill, joint_log_prob, marginals
from pyquiet.diffusion import AREnergy, MaskedDenoiser, NCEEnergy, diffuse
from pyquiet.quiet_star import QuietStarConfig, QuietStarForCausalLM, QuietStarObjective
from pyquiet.zoo import load

__version__ = "0.1.0"
__all__ = [
    "AREnergy",
    "AnySubsetTrainer",
    "AnySubsetTrainingArguments",
    "DiffusionTrainer",
    "DiffusionTrainingArguments",
    "MaskedDenoiser",
    "NCEEnergy",
    "NCETrainer",
    "NCETrainingArguments",
    "NextTokenTrainer",
    "NextTokenTrainingArguments",
    "QuietStarConfig",
    "QuietStarForCausalLM",
    "QuietStarObjective",
    "QuietStarTrainer",
    "QuietStarTrainingArguments",
    "any_subset",
    "bilevel",
    "diffuse",
    "diffusion",
    "infill",
    "joint_log_prob",
    "load",
    "marginals",
    "quiet_star",
    "scaling",
]


def __getattr__(name: str) -> Any:
    if name in ("evaluation", "plotting", "prompts", "testing"):
        return import_module(f"pyquiet.{name}")
    for system in (quiet_star, any_subset, diffusion):
        if name in __all__ and name in system.__all__:
            return getattr(system, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
