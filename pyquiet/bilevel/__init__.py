"""Optimisation of many small problems inside a large one (BSVRB, arXiv 2305.18730)."""

from pyquiet.bilevel.baselines import RSVRB, BlockSOBA, StocBiO
from pyquiet.bilevel.bsvrb import BSVRB
from pyquiet.bilevel.hypergradient import hypergradient, solve_lower
from pyquiet.bilevel.problem import BlockwiseProblem, Problem

__all__ = ["BSVRB", "RSVRB", "BlockSOBA", "BlockwiseProblem", "Problem", "StocBiO", "hypergradient", "solve_lower"]
