"""Hugging Face language models that think before they speak, on native kernels."""

from pyquiet.quiet_star import QuietStarConfig, QuietStarForCausalLM, QuietStarObjective
from pyquiet.zoo import load

__version__ = "0.1.0"
__all__ = ["QuietStarConfig", "QuietStarForCausalLM", "QuietStarObjective", "load"]
