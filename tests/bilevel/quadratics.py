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


class Replicas(Quadratics):
    """So many runs of one problem at once, for means over them: x [R d_x] and rows [R d_y] hold one after the other.

    Each has noise of its own, and each its own order of the blocks, so that runs that look at the same numbers look at
    different blocks. At other numbers of samples the same seed gives the same noise, scaled.
    """

    points = True

    def __init__(self, count: int, m: int, dim_x: int, dim_y: int, *, noise: Noise) -> None:
        super().__init__(m, dim_x, dim_y, noise=noise)
        self.count, self.dim_y = count, count * dim_y
        g = torch.Generator().manual_seed(11)
        order = torch.stack([torch.randperm(m, generator=g) for _ in range(count)], 1)
        self.A, self.C, self.b, self.t = (part[order] for part in (self.A, self.C, self.b, self.t))  # [m, R, ...]
        self.solution = self.solution.repeat(count)

    def _runs(self, flat: Tensor) -> Tensor:
        return flat.view(*flat.shape[:-1], self.count, -1)

    def gradient(self, x: Tensor) -> Tensor:
        """The hypergradients, [R, d_x]."""
        return self._runs(x - self.solution) @ self.curvature

    def settled(self) -> tuple[Tensor, Tensor]:
        """y_i and v_i at the solution, [m, R d_y] each."""
        y = torch.linalg.solve(self.A, (self.C @ self._runs(self.solution)[..., None])[..., 0] + self.b)
        return y.flatten(1), torch.linalg.solve(self.A, y - self.t).flatten(1)

    def sample(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> dict[str, Tensor]:
        d = self.dim_y // self.count
        scale = 0.0 if samples is None else samples**-0.5  # a mean over samples

        def noise(size: float, *more: int) -> Tensor:
            return scale * size * torch.randn(len(idx), self.count, d, *more, generator=generator, dtype=torch.float64)

        E = noise(self.noise.A, d)
        return {"A": (E + E.mT) / 2, "b": noise(self.noise.b), "t": noise(self.noise.t)}

    def lower(self, x: Any, Y: Tensor, idx: Tensor, batch: Any) -> Tensor:
        y = self._runs(Y)
        Ay = ((self.A[idx] + batch["A"]) @ y[..., None])[..., 0]
        Cx = (self.C[idx] @ self._runs(x)[..., None, :, :, None])[..., 0]
        return (y * (Ay / 2 - Cx - self.b[idx] - batch["b"])).sum((-1, -2))

    def upper(self, x: Any, Y: Tensor, idx: Tensor, batch: Any) -> Tensor:
        near = (self._runs(Y) - self.t[idx] - batch["t"]).square().sum((-1, -2)) / 2
        return near + self.rho / 2 * x.square().sum(-1, keepdim=True)
