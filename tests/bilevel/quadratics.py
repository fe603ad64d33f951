"""Quadratic blocks with known solutions: g_i = y'A_i y / 2 - y'(C_i x + b_i), f_i = |y - t_i|^2 / 2 + rho |x|^2 / 2."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyquiet.bilevel import Problem

MU, L = 1.0, 4.0


@dataclass
class Noise:
    """Standard deviations of a sample's A, b and t."""

    A: float = 0.0
    b: float = 0.0
    t: float = 0.0


class Quadratics(Problem):
    """m random blocks with eigenvalues of A_i from MU to L. x may be a tensor [d_x]."""

    def __init__(self, m: int, dim_x: int, dim_y: int, *, rho: float = 0.1, noise: Noise | None = None) -> None:
        g = torch.Generator().manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.m, self.dim_y, self.rho, self.noise = m, dim_y, rho, noise or Noise()
        basis = torch.linalg.qr(normal(m, dim_y, dim_y)).Q
        values = MU + (L - MU) * torch.linspace(0, 1, dim_y, dtype=torch.float64).expand(m, dim_y)
        self.A = basis @ (values[..., None] * basis.mT)
        self.C, self.b, self.t = normal(m, dim_y, dim_x) / 2, normal(m, dim_y), normal(m, dim_y)
        P, q = torch.linalg.solve(self.A, self.C), torch.linalg.solve(self.A, self.b[..., None])[..., 0]
        self.curvature = (P.mT @ P).mean(0) + rho * torch.eye(dim_x, dtype=torch.float64)
        self.solution = torch.linalg.solve(self.curvature, (P.mT @ (self.t - q)[..., None]).mean(0))[:, 0]

    def gradient(self, x: Tensor) -> Tensor:
        """The hypergradient, in closed form."""
        return self.curvature @ (x - self.solution)

    def best_y(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.A, (self.C @ x + self.b)[..., None])[..., 0]

    def sample(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> dict[str, Tensor]:
        shape = (len(idx), samples or 1, self.dim_y)
        zero = samples is None

        def noise(scale: float, *more: int) -> Tensor:
            draw = torch.randn(*shape, *more, generator=generator, dtype=torch.float64).mean(1)
            return draw * (0.0 if zero else scale)

        E = noise(self.noise.A, self.dim_y)
        return {"A": (E + E.mT) / 2, "b": noise(self.noise.b), "t": noise(self.noise.t)}

    def lower(self, x: Any, Y: Tensor, idx: Tensor, batch: Any) -> Tensor:
        A = self.A[idx] + batch["A"]
        Ay = (A @ Y[..., None])[..., 0]
        return (Y * (Ay / 2 - self.C[idx] @ x - self.b[idx] - batch["b"])).sum(1)

    def upper(self, x: Any, Y: Tensor, idx: Tensor, batch: Any) -> Tensor:
        return (Y - self.t[idx] - batch["t"]).square().sum(1) / 2 + self.rho / 2 * x.square().sum()
