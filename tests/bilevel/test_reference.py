"""BSVRB against the algorithm as the paper writes it: every row moved in every step, derivatives written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyquiet.bilevel import BSVRB

from .quadratics import Noise, Quadratics

RATES = {"alpha": 0.3, "beta": 0.2, "tau": 0.04, "tau_v": 0.03, "eta": 0.02}


class Recorded(Quadratics):
    """Keeps what a run draws: of each step the blocks with their samples for the lower and for the upper losses."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, noise=Noise(0.1, 1, 1))
        self.drawn: list[tuple[Tensor, dict[str, Tensor]]] = []

    def sample(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> dict[str, Tensor]:
        self.drawn.append((idx, super().sample(idx, samples, generator)))
        return self.drawn[-1][1]


def at(
    problem: Quadratics, lower: Any, upper: Any, fresh: Tensor, point: tuple[Tensor, ...], inverts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The direction, and the samples of grad_y g and of H or H v - grad_y f, of a step's blocks at a point."""
    (idx, low), (_, up), (x, y, v, H) = lower, upper, point
    A = problem.A[idx] + low["A"]
    gy = (A @ y[idx, :, None])[..., 0] - problem.C[idx] @ x - problem.b[idx] - low["b"]
    fy = y[idx] - problem.t[idx] - up["t"]
    tracker = torch.where(fresh[:, None, None], A, H[idx])
    w = torch.linalg.solve(tracker, fy) if inverts else v[idx]
    direction = problem.rho * x + (problem.C[idx].mT @ w[..., None])[..., 0].mean(0)  # J = -C
    return direction, gy, A if inverts else (A @ w[..., None])[..., 0] - fy


def as_written(problem: Recorded, x: Tensor, blocks: int, *, inverts: bool) -> tuple[Tensor, Tensor]:
    """x and y after the steps that were drawn."""
    alpha, beta, tau, tau_v, eta = RATES.values()
    m, d = problem.m, problem.dim_y
    gamma = m / blocks - alpha  # for one block, and wherever all are looked at, that of STORM, 1 - alpha
    y, s, v, u = (torch.zeros(m, d, dtype=torch.float64) for _ in range(4))
    H = torch.zeros(m, d, d, dtype=torch.float64)
    seen = torch.zeros(m, dtype=torch.bool)
    z, before = torch.zeros_like(x), (x, y, v, H)
    for t in range(len(problem.drawn) // 2):
        idx = problem.drawn[2 * t][0]
        fresh = ~seen[idx]
        new, old = (
            at(problem, *problem.drawn[2 * t : 2 * t + 2], fresh, point, inverts) for point in ((x, y, v, H), before)
        )
        z = new[0] if t == 0 else (1 - beta) * (z - old[0]) + new[0]
        before = (x, y, v, H.clone())
        for rows, now, then in ((s, new[1], old[1]), (H if inverts else u, new[2], old[2])):
            found = (1 - alpha) * rows[idx] + alpha * now + gamma * (now - then)
            rows[idx] = torch.where(fresh.view(-1, *[1] * (rows.ndim - 1)), now, found)
        before[3][idx[fresh]] = H[idx[fresh]]  # a new block's first sample stands for what it had been before
        seen[idx] = True
        x, y, v = x - eta * z, y - tau * s, v - tau_v * u
    return x, y


@pytest.mark.parametrize("variant", ["v1", "v2"])
@pytest.mark.parametrize(("m", "blocks"), [(1, 1), (3, 3), (7, 2)])
def test_it_is_the_algorithm_as_written(variant: str, m: int, blocks: int) -> None:
    problem = Recorded(m, 4, 3)
    x = torch.ones(4, dtype=torch.float64)
    rates: dict[str, Any] = {key: value for key, value in RATES.items() if key != "tau_v" or variant == "v2"}
    method = BSVRB(problem, x, blocks_per_step=blocks, samples_per_block=2, variant=variant, gamma="drift", **rates)
    for _ in range(60):
        method.step()
    expected_x, expected_y = as_written(problem, x, blocks, inverts=variant == "v1")
    torch.testing.assert_close(method.x, expected_x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(method.flush(), expected_y, rtol=1e-12, atol=1e-13)
