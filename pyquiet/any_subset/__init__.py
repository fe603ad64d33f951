"""Any-subset autoregressive models: a text filled in any order, exactly and in parallel (arXiv 2504.20456)."""

from pyquiet.any_subset.conversion import load_released
from pyquiet.any_subset.drafting import Context, ngram_drafter
from pyquiet.any_subset.engine import Cache, Engine, as_engine
from pyquiet.any_subset.generation import generate
from pyquiet.any_subset.likelihood import joint_log_prob, marginals
from pyquiet.any_subset.order import order_from_mask
from pyquiet.any_subset.rounds import Origin
from pyquiet.any_subset.sampling import Infilling, infill
from pyquiet.lazy import lazily

__all__ = [
    "AnySubsetTrainer",
    "AnySubsetTrainingArguments",
    "Cache",
    "Context",
    "Engine",
    "Infilling",
    "Origin",
    "any_subset_loss",
    "as_engine",
    "generate",
    "infill",
    "joint_log_prob",
    "load_released",
    "marginals",
    "ngram_drafter",
    "order_from_mask",
]

__getattr__ = lazily(
    __name__,
    {
        "AnySubsetTrainer": "trainer",
        "AnySubsetTrainingArguments": "arguments",
        "any_subset_loss": "training",
    },
)
