"""Any-subset autoregressive models: a text filled in any order, exactly and in parallel (arXiv 2504.20456)."""

from pyquiet.any_subset.engine import Cache, Engine, as_engine
from pyquiet.any_subset.order import order_from_mask

__all__ = ["Cache", "Engine", "as_engine", "order_from_mask"]
