"""What BSVRB is measured against, in its interface: block SOBA, an RSVRB-style and a stocBiO-like method.

None of them corrects its estimates by differences of gradients over the blocks' gaps. SOBA takes one stochastic step of
each kind, stocBiO several of the lower one and a Neumann series, RSVRB keeps dense trackers of all blocks.
"""

from typing import Any

import torch
from torch import Tensor

from pyquiet.bilevel.method import BlockMethod, Rate, at_least, check_rate, check_share, rate
from pyquiet.bilevel.problem import Derivatives, Problem
from pyquiet.checks import check_count, check_positive


class BlockSOBA(BlockMethod):
    """One stochastic step of y_i, of v_i and of x, for the sampled blocks (SOBA, arXiv 2201.13409, by blocks).

    Args:
        tau, tau_v: step sizes of y and v. problem, x, eta, **kwargs: as `BlockMethod`.
    """

    def __init__(self, problem: Problem, x: Any, *, tau: Rate, tau_v: Rate, eta: Rate, **kwargs: Any) -> None:
        self.tau, self.tau_v = check_rate("tau", tau), check_rate("tau_v", tau_v)
        super().__init__(problem, x, eta=eta, **kwargs)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {"y": (self.problem.dim_y,), "v": (self.problem.dim_y,)}

    def step(self) -> dict[str, float]:
        """One step; statistics of it."""
        rows, chance, lower, upper = self._draw()
        row = self.table.gather(rows, {})
        with self._same_noise():
            at = self._at(self._x, row["y"], rows)
            gradient = at.gradient(lower)
            direction, gy, hv = at.direction(gradient, upper, row["v"], self._weights(chance))
        y = row["y"] - rate(self.tau, self.steps) * gradient.detach()
        v = row["v"] - rate(self.tau_v, self.steps) * (hv - gy)
        self.table.scatter(rows, {}, {"y": y, "v": v})
        self._move(self._sum(direction))
        return {"z_norm": float(self._z.norm())}


class StocBiO(BlockMethod):
    """Several steps of y_i and a Neumann series for H_i^{-1} grad_y f_i, anew in each step (arXiv 2010.07962).

    Each step of y_i has samples of its own; the series has those of one more draw in all of its terms.

    Args:
        tau: step size of y, and of the series, so below 1 / L. inner: steps of y. terms: of the series.
        problem, x, eta, **kwargs: as `BlockMethod`.
    """

    def __init__(
        self, problem: Problem, x: Any, *, tau: Rate, eta: Rate, inner: int = 5, terms: int = 10, **kwargs: Any
    ) -> None:
        self.tau, self.inner = check_rate("tau", tau), check_count("inner", inner, least=1)
        self.terms = check_count("terms", terms, least=1)
        super().__init__(problem, x, eta=eta, **kwargs)

    def step(self) -> dict[str, float]:
        """One step; statistics of it."""
        rows, chance, lower, upper = self._draw()
        y, tau = self.table.gather(rows, {})["y"], rate(self.tau, self.steps)
        with self._same_noise():
            for _ in range(self.inner):
                y = y - tau * self._at(self._x, y, rows).gradient(self._more(rows)).detach()
            at = self._at(self._x, y, rows)
            gradient = at.gradient(lower)
            gx, gy = at.upper(upper, self._weights(chance))
            v = term = tau * gy
            for _ in range(self.terms - 1):
                term = term - tau * at.pull(gradient, term)[1]
                v = v + term
            jv, _ = at.pull(gradient, v, self._weights(chance))
        self.table.scatter(rows, {}, {"y": y})
        self._move(self._sum(gx - jv))
        return {"z_norm": float(self._z.norm())}


class RSVRB(BlockMethod):
    """Dense STORM trackers of grad_y g, H and J of all blocks, a step's samples scaled by m / I (arXiv 2105.02266).

    A step touches all m blocks and keeps dim_y dim_x numbers of each, so it is for small problems.

    Args:
        alpha: of the blocks' trackers, beta: of the hypergradient's. tau: step size of y. floor: least eigenvalue of H.
        problem, x, eta, **kwargs: as `BlockMethod`.
    """

    def __init__(
        self,
        problem: Problem,
        x: Any,
        *,
        tau: Rate,
        eta: Rate,
        alpha: float = 0.3,
        beta: float = 0.2,
        floor: float = 1e-2,
        **kwargs: Any,
    ) -> None:
        self.tau, self.alpha, self.beta = check_rate("tau", tau), check_share("alpha", alpha), check_share("beta", beta)
        self.floor = check_positive("floor", floor)
        super().__init__(problem, x, eta=eta, **kwargs)
        self._x_before, self._y_before = self._x, self.table.fields["y"].clone()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        d = self.problem.dim_y
        return {"y": (d,), "s": (d,), "H": (d, d), "J": (d, len(self._x))}

    def step(self) -> dict[str, float]:
        """One step; statistics of it."""
        rows, chance, lower, upper = self._draw()
        fields = self.table.fields
        with self._same_noise():
            new = self._oracles(self._x, fields["y"], rows, lower)
        with self._same_noise():
            old = self._oracles(self._x_before, self._y_before, rows, lower)
        keep = 1 - self.alpha
        for name, now, before in zip(("s", "H", "J"), new, old, strict=True):
            scale = (1 / chance).to(now).view(-1, *[1] * (now.ndim - 1))
            fields[name] *= keep if self.steps else 0.0
            fields[name][rows] += scale * (now - keep * before if self.steps else now)
        H, _ = at_least(fields["H"][rows], self.floor)
        points = ((self._x, fields["y"]), (self._x_before, self._y_before))
        directions = []
        for x, y in points:
            with self._same_noise():
                gx, gy = self._at(x, y[rows], rows).upper(upper, self._weights(chance))
            v = torch.linalg.solve(H, gy) * self._weights(chance)[:, None]
            directions.append(gx - (fields["J"][rows] * v[..., None]).sum((0, 1)))
        self._x_before, self._y_before = self._x, fields["y"].clone()
        fields["y"] -= rate(self.tau, self.steps) * fields["s"]
        move = self._sum(directions[0] - (1 - self.beta) * directions[1] if self.steps else directions[0])
        self._move((1 - self.beta) * self._z + move if self.steps else move)
        return {"z_norm": float(self._z.norm())}

    def _oracles(self, x: Tensor, y: Tensor, rows: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        at = self._at(x, y[rows], rows)
        gradient = at.gradient(batch)
        return gradient.detach(), at.hessian(gradient), _jacobians(at, gradient)

    def _state(self) -> dict[str, Tensor]:
        return {"x_before": self._x_before, "y_before": self._y_before}

    def _load_state(self, own: dict[str, Tensor], states: tuple[dict[str, Tensor], ...]) -> None:
        self._x_before = own["x_before"].to(self._x)
        rows = {int(block): y for state in states for block, y in zip(state["owned"], state["y_before"], strict=True)}
        for row, block in enumerate(self.owned.tolist()):
            self._y_before[row] = rows[block].to(self._x)


def _jacobians(at: Derivatives, gradient: Tensor) -> Tensor:
    """J_i [I, d, d_x], one backward pass for each of their rows."""
    blocks, d = gradient.shape
    units = torch.eye(blocks * d, dtype=gradient.dtype, device=gradient.device).view(-1, blocks, d)
    (J,) = torch.autograd.grad(gradient, at.x, units, retain_graph=True, materialize_grads=True, is_grads_batched=True)
    return J.view(blocks, d, -1)
