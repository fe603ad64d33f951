"""The methods that BSVRB is measured against find the solution too, where nothing hinders them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyquiet.bilevel import RSVRB, BlockSOBA, StocBiO

from .quadratics import Noise, Quadratics

METHODS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "soba": (BlockSOBA, 400, {"tau": 0.2, "tau_v": 0.2}),
    "stocbio": (StocBiO, 80, {"tau": 0.2, "terms": 80}),
    "rsvrb": (RSVRB, 150, {"tau": 0.2}),
}


@pytest.mark.parametrize("name", METHODS)
def test_without_noise_and_with_all_blocks_they_end_at_the_solution(name: str) -> None:
    kind, steps, options = METHODS[name]
    problem = Quadratics(4, 3, 3, rho=0.5)
    method = kind(problem, torch.ones(3).double(), blocks_per_step=4, samples_per_block=1, eta=0.4, **options)
    for _ in range(steps):
        method.step()
    assert float((method.x - problem.solution).norm()) < 1e-6
    assert float((method.flush() - problem.best_y(problem.solution)).norm()) < 1e-5


def test_stocbio_draws_samples_for_each_of_its_steps() -> None:
    class Counted(Quadratics):
        drawn: list[Tensor]

        def sample(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> dict[str, Tensor]:
            found = super().sample(idx, samples, generator)
            self.drawn.append(found["b"])
            return found

    problem = Counted(4, 3, 3, noise=Noise(0, 1, 0))
    problem.drawn = []
    sizes = {"blocks_per_step": 2, "samples_per_block": 2}
    StocBiO(problem, torch.ones(3).double(), tau=0.1, eta=0.1, inner=3, **sizes).step()
    assert len(problem.drawn) == 5  # of the steps of y, of the series and of the upper losses
    assert len({float(draw[0, 0]) for draw in problem.drawn}) == 5
