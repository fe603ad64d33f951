"""Quiet-STaR (arXiv 2403.09629): language models that think after every token before they predict the next."""

from pyquiet.quiet_star.configuration import QuietStarConfig
from pyquiet.quiet_star.generation import GeneratedThoughts, QuietStarGenerateOutput
from pyquiet.quiet_star.modeling import QuietStarForCausalLM, Thoughts
from pyquiet.quiet_star.objective import QuietStarObjective, ThinkingLoss

__all__ = [
    "GeneratedThoughts",
    "QuietStarConfig",
    "QuietStarForCausalLM",
    "QuietStarGenerateOutput",
    "QuietStarObjective",
    "ThinkingLoss",
    "Thoughts",
]
