"""A BSVRB step against one batched oracle of its size, a loop over blocks, and tables of other sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from pyquiet.bilevel import BSVRB, Problem
from pyquiet.bilevel.problem import row_scores

from .machine import Machine
from .timing import best_seconds

BLOCKS, SAMPLES, DIM_X, DIM_Y = 32, 32, 128, 64
ALPHA, BETA, RATES = 0.3, 0.2, {"gamma": 0.7, "tau": 1e-3, "eta": 1e-3}


class Regressions(Problem):
    """Logistic regressions of y on rows of random features, whose offsets x moves. A batch holds the data themselves,
    so that they are gathered once for both points of a step."""

    points = True

    def __init__(self, m: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.m, self.dim_y = m, DIM_Y
        self.features = torch.randn(4096, DIM_Y, generator=g)
        self.shift = torch.randn(4096, DIM_X, generator=g) / DIM_X**0.5
        self.targets = torch.randn(4096, generator=g)

    def sample(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> tuple[Tensor, ...]:
        return self._rows((self.features, self.targets, self.shift), len(idx), samples or 4096, generator)

    def sample_upper(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> tuple[Tensor, ...]:
        return self._rows((self.features, self.targets), len(idx), samples or 4096, generator)

    def _rows(self, data: tuple[Tensor, ...], blocks: int, samples: int, g: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(4096, (blocks * samples,), generator=g)
        return tuple(x.index_select(0, rows).view(blocks, samples, *x.shape[1:]) for x in data)

    def lower(self, x: Any, Y: Tensor, idx: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        features, targets, shift = batch
        wanted = targets + torch.tensordot(x, shift, ([-1], [-1]))
        return torch.nn.functional.softplus(row_scores(features, Y) - wanted).mean(-1) + Y.square().sum(-1) / 2

    def upper(self, x: Any, Y: Tensor, idx: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        features, targets = batch
        return (row_scores(features, Y) - targets).square().mean(-1)


def method(m: int) -> BSVRB:
    sizes = {"blocks_per_step": BLOCKS, "samples_per_block": SAMPLES}
    shares = {"alpha": ALPHA, "beta": BETA}
    return BSVRB(Regressions(m), torch.zeros(DIM_X), variant="v2", **sizes, **shares, **RATES, tau_v=RATES["tau"])


def oracle() -> Callable[[], object]:
    """grad_y g, J^T v, H v and the gradients of f of the blocks of a step, in plain batched autograd."""
    problem = Regressions(BLOCKS)
    idx, g = torch.arange(BLOCKS), torch.Generator().manual_seed(1)
    lower, upper = problem.sample(idx, SAMPLES, g), problem.sample_upper(idx, SAMPLES, g)
    v = torch.randn(BLOCKS, DIM_Y, generator=g)

    def run() -> object:
        x, Y = torch.zeros(DIM_X, requires_grad=True), torch.zeros(BLOCKS, DIM_Y, requires_grad=True)
        (gy,) = torch.autograd.grad(problem.lower(x, Y, idx, lower).sum(), Y, create_graph=True)
        pulled = torch.autograd.grad(gy, (x, Y), v)
        return pulled, torch.autograd.grad(problem.upper(x, Y, idx, upper).sum(), Y)

    return run


class Loop:
    """The same step of v2 as one would write it for one block after the other, drawing what a `BSVRB` draws."""

    def __init__(self, m: int, one_block: "OneBlock") -> None:
        self.like, self.one_block = method(m), one_block
        self.x = self.x_before = self.z = torch.zeros(DIM_X)
        self.y, self.s, self.v, self.u = ([torch.zeros(DIM_Y)] * m for _ in range(4))
        self.last: list[int | None] = [None] * m

    def step(self) -> None:
        like, t = self.like, self.like.steps
        rows, _, lower, upper = like._draw()
        new, old = torch.zeros(DIM_X), torch.zeros(DIM_X)
        for i, low, up in zip(rows.tolist(), zip(*lower, strict=True), zip(*upper, strict=True), strict=True):
            late = 0 if (last := self.last[i]) is None else RATES["tau"] * (t - last)
            y, v, s, u = self.y[i] - late * self.s[i], self.v[i] - late * self.u[i], self.s[i], self.u[i]
            gn, un, dn = self.one_block(self.x, y, v, low, up)
            go, uo, do = self.one_block(self.x_before, y + RATES["tau"] * s, v + RATES["tau"] * u, low, up)
            if last is None:
                s, u = gn, un
            else:
                s = (1 - ALPHA) * s + ALPHA * gn + RATES["gamma"] * (gn - go)
                u = (1 - ALPHA) * u + ALPHA * un + RATES["gamma"] * (un - uo)
            self.y[i], self.v[i], self.s[i], self.u[i], self.last[i] = y, v, s, u, t
            new, old = new + dn / BLOCKS, old + do / BLOCKS
        self.z = (1 - BETA) * (self.z - old) + new if t else new
        self.x_before, self.x = self.x, self.x - RATES["eta"] * self.z
        like.steps += 1


Batch = tuple[Tensor, ...]
OneBlock = Callable[[Tensor, Tensor, Tensor, Batch, Batch], tuple[Tensor, Tensor, Tensor]]


def lower_of_one(x: Tensor, y: Tensor, batch: Batch) -> Tensor:
    features, targets, shift = batch
    return torch.nn.functional.softplus(features @ y - targets - shift @ x).mean() + y.dot(y) / 2


def upper_of_one(y: Tensor, batch: Batch) -> Tensor:
    return (batch[0] @ y - batch[1]).square().mean()


def by_autograd(x: Tensor, y: Tensor, v: Tensor, lower: Batch, upper: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """grad_y g, H v - grad_y f and -J^T v of a block; its f does not depend on x."""
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    (gy,) = torch.autograd.grad(lower_of_one(x, y, lower), y, create_graph=True)
    jv, hv = torch.autograd.grad(gy, (x, y), v)
    (fy,) = torch.autograd.grad(upper_of_one(y, upper), y)
    return gy.detach(), hv - fy, -jv


def by_functions(x: Tensor, y: Tensor, v: Tensor, lower: Batch, upper: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torch.func, as one would write it to lift it by vmap."""
    gy, pull = torch.func.vjp(torch.func.grad(lambda x, y: lower_of_one(x, y, lower), 1), x, y)
    jv, hv = pull(v)
    return gy, hv - torch.func.grad(upper_of_one)(y, upper), -jv


@pytest.mark.parametrize("one_block", [by_autograd, by_functions])
def test_the_loop_takes_the_steps_of_bsvrb(one_block: OneBlock) -> None:
    ours, loop = method(40), Loop(40, one_block)
    for _ in range(20):
        ours.step(), loop.step()
    assert isinstance(ours.x, Tensor)
    for found, expected in ((loop.z, ours._z), (loop.x, ours.x)):
        assert float((found - expected).norm() / expected.norm()) < 1e-4


STEP = "BSVRB step, m=1e3"
CASES: dict[str, Callable[[], Callable[[], object]]] = {
    STEP: lambda: method(1000).step,
    "BSVRB step, m=1e6": lambda: method(1_000_000).step,
    "one batched oracle": oracle,
    "loop over blocks": lambda: Loop(1000, by_autograd).step,
    "loop over blocks, torch.func": lambda: Loop(1000, by_functions).step,
}


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    """Seconds of the cases of this run."""
    return {}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("one_thread")
def test_step(benchmark: BenchmarkFixture, machine: Machine, measured: dict[str, float], case: str) -> None:
    measured[case] = seconds = best_seconds(benchmark, CASES[case]())
    benchmark.extra_info.update(
        table=f"bilevel, I={BLOCKS} B={SAMPLES} d_x={DIM_X} d_y={DIM_Y}, 1 thread",
        method=case,
        microseconds=seconds * 1e6,
    )
    if STEP in measured:  # not where this case alone was asked for
        benchmark.extra_info["of_a_step"] = seconds / measured[STEP]
