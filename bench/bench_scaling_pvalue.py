"""A p-value and its label in a large bank: by order against the count over all scores, the O(n) form."""

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from pyquiet.scaling.conformal import Bank, ClusteredBank, Rule, rank

from .timing import best_seconds

RULE = Rule(0.4, "budget")
QUESTIONS = 1000  # that the scores of a clustered bank are of


def counted(scores: NDArray[np.float64], score: float) -> tuple[float, str]:
    """p_low and its label by numpy's fastest count, over scores in any order."""
    p = (1 + np.count_nonzero(scores >= score)) / (len(scores) + 1)
    return p, "takeover" if p <= RULE.takeover_rate else "accept"


@pytest.mark.parametrize("method", ["pyquiet", "pyquiet clustered", "numpy count"])
@pytest.mark.parametrize("n", [10**3, 10**4, 10**5, 10**6])
def test_a_p_value(benchmark: BenchmarkFixture, n: int, method: str) -> None:
    """1,000 scores one after the other, each ranked and labelled; the bank is made before the clock starts."""
    rng = np.random.default_rng(0)
    scores, new = rng.normal(size=n), rng.normal(size=1000).tolist()
    bank = Bank(scores)
    clustered = ClusteredBank(Bank(scores, tuple(str(i % QUESTIONS) for i in range(n)))) if "clus" in method else None

    def ordered(score: float) -> tuple[float, str]:
        if clustered is not None:
            value = clustered.rank(score, 0.5, guaranteed=True, why="")
        else:
            value = rank(bank, score, 0.5, guaranteed=True, why="")
        return value.low, RULE.label(value)

    answer = (lambda score: counted(scores, score)) if method == "numpy count" else ordered
    if clustered is None:
        assert [answer(score) for score in new[:100]] == [counted(scores, score) for score in new[:100]]
    some = new if method != "numpy count" or n < 10**5 else new[:20]
    seconds = best_seconds(benchmark, lambda: [answer(score) for score in some]) / len(some)
    benchmark.extra_info.update(
        table="a p-value and its label (goal: 20 microseconds at 1e6)",
        shape=f"{n:.0e}",
        method=method,
        seconds=seconds,
        microseconds=seconds * 1e6,
    )
