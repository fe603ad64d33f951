"""A BSVRB step against one batched oracle of its size, a loop over blocks, and tables of other sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from pyquiet.bilevel import BSVRB, Problem

from .machine import Machine
from .timing import best_seconds

BLOCKS, SAMPLES, DIM_X, DIM_Y = 32, 32, 128, 64


class Regressions(Problem):
    """Ridge regressions of y on rows of random features, whose targets x moves; the rows are drawn when asked for."""

    def __init__(self, m: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.m, self.dim_y = m, DIM_Y
        self.features = torch.randn(4096, DIM_Y, generator=g)
        self.shift = torch.randn(4096, DIM_X, generator=g) / DIM_X**0.5
        self.targets = torch.randn(4096, generator=g)

    def sample(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> Tensor:
        return torch.randint(4096, (len(idx), samples or 4096), generator=generator)

    def lower(self, x: Any, Y: Tensor, idx: Tensor, batch: Tensor) -> Tensor:
        fitted = (self.features[batch] @ Y[..., None])[..., 0]
        wanted = self.targets[batch] + self.shift[batch] @ x
        return torch.nn.functional.softplus((fitted - wanted).abs()).mean(1) + Y.square().sum(1) / 2

    def upper(self, x: Any, Y: Tensor, idx: Tensor, batch: Tensor) -> Tensor:
        return ((self.features[batch] @ Y[..., None])[..., 0] - self.targets[batch]).square().mean(1)


def method(m: int) -> BSVRB:
    rates = {"gamma": 0.7, "tau": 1e-3, "tau_v": 1e-3, "eta": 1e-3}
    sizes = {"blocks_per_step": BLOCKS, "samples_per_block": SAMPLES}
    return BSVRB(Regressions(m), torch.zeros(DIM_X), variant="v2", **sizes, **rates)


def oracle() -> Callable[[], object]:
    """grad_y g, J^T v, H v and the gradients of f of the blocks of a step, in plain batched autograd."""
    problem = Regressions(BLOCKS)
    idx, g = torch.arange(BLOCKS), torch.Generator().manual_seed(1)
    batch, v = problem.sample(idx, SAMPLES, g), torch.randn(BLOCKS, DIM_Y, generator=g)

    def run() -> object:
        x, Y = torch.zeros(DIM_X, requires_grad=True), torch.zeros(BLOCKS, DIM_Y, requires_grad=True)
        (gy,) = torch.autograd.grad(problem.lower(x, Y, idx, batch).sum(), Y, create_graph=True)
        pulled = torch.autograd.grad(gy, (x, Y), v)
        return pulled, torch.autograd.grad(problem.upper(x, Y, idx, batch).sum(), Y)

    return run


def loop() -> Callable[[], object]:
    """The two points of a step, block by block."""
    problem = Regressions(BLOCKS)
    g = torch.Generator().manual_seed(1)
    batch, v = problem.sample(torch.arange(BLOCKS), SAMPLES, g), torch.randn(BLOCKS, DIM_Y, generator=g)

    def run() -> object:
        total = torch.zeros(DIM_X)
        for _ in range(2):
            for i in range(BLOCKS):
                x, y = torch.zeros(DIM_X, requires_grad=True), torch.zeros(1, DIM_Y, requires_grad=True)
                one = torch.tensor([i])
                (gy,) = torch.autograd.grad(problem.lower(x, y, one, batch[i : i + 1]).sum(), y, create_graph=True)
                jv, _ = torch.autograd.grad(gy, (x, y), v[i : i + 1])
                torch.autograd.grad(problem.upper(x, y, one, batch[i : i + 1]).sum(), y)
                total += jv
        return total

    return run


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    "BSVRB step, m=1e3": lambda: method(1000).step,
    "BSVRB step, m=1e6": lambda: method(1_000_000).step,
    "one batched oracle": oracle,
    "loop over blocks": loop,
}


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    """Seconds of the cases of this run."""
    return {}


@pytest.mark.parametrize("case", CASES)
def test_step(benchmark: BenchmarkFixture, machine: Machine, measured: dict[str, float], case: str) -> None:
    torch.set_num_threads(1)
    measured[case] = seconds = best_seconds(benchmark, CASES[case]())
    benchmark.extra_info.update(
        table=f"bilevel, I={BLOCKS} B={SAMPLES} d_x={DIM_X} d_y={DIM_Y}, 1 thread",
        method=case,
        microseconds=seconds * 1e6,
        of_a_step=seconds / measured["BSVRB step, m=1e3"],
    )
