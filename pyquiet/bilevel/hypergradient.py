"""The exact hypergradient of a problem, on all its data: what the stochastic methods are measured by."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyquiet.bilevel.problem import Derivatives, Flat, Problem

_NEWTON, _TOLERANCE = 100, 1e-10


def solve_lower(problem: Problem, x: Any, Y: Tensor, *, tolerance: float = _TOLERANCE) -> Tensor:
    """y_i(x) of all blocks, [m, d], by Newton's method from Y [m, d] on all data.

    Raises:
        RuntimeError: a block's gradient does not fall to `tolerance` (1 + its first size).
    """
    flat = Flat(x)
    idx, batch = _all(problem, upper=False)
    Y = Y.clone()
    goal = None
    for _ in range(_NEWTON):
        at = Derivatives(problem, flat, flat.vector, Y, idx)
        gradient = at.gradient(batch)
        size = gradient.detach().norm(dim=1)
        goal = tolerance * (1 + size) if goal is None else goal
        if (size <= goal).all():
            return Y
        Y = _line_search(problem, at, batch, Y, _newton_step(at, gradient))
    raise RuntimeError(f"lower: Newton's method leaves a gradient of {float(size.max())}; is g strongly convex in y?")


def _newton_step(at: Derivatives, gradient: Tensor) -> Tensor:
    return conjugate_gradients(lambda v: at.pull(gradient, v)[1], gradient.detach())


def hypergradient(problem: Problem, x: Any, Y: Tensor | None = None, *, exact: bool = True) -> Tensor:
    """The gradient of F at x on all data, [d_x] in the order of x's parts.

    Args:
        Y: [m, d], where Newton's method starts (None: zeros), or with `exact=False` the point to take for y(x).

    H_i^{-1} grad_y f_i is found by conjugate gradients.

    Raises:
        RuntimeError: the lower problem could not be solved.
    """
    flat = Flat(x)
    if Y is None:
        Y = torch.zeros(problem.m, problem.dim_y, dtype=flat.vector.dtype, device=flat.vector.device)
    if exact:
        Y = solve_lower(problem, x, Y)
    idx, batch = _all(problem, upper=False)
    at = Derivatives(problem, flat, flat.vector, Y, idx)
    gx, gy = at.upper(_all(problem, upper=True)[1])
    gradient = at.gradient(batch)
    v = conjugate_gradients(lambda v: at.pull(gradient, v)[1], gy)
    return (gx - at.pull(gradient, v)[0]) / problem.m


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, *, tolerance: float = 1e-14, steps: int | None = None
) -> Tensor:
    """The solutions of H_i v_i = b_i, [I, d], for positive definite H_i given by their products with v [I, d]."""
    v, residual = torch.zeros_like(b), b.clone()
    direction, size = residual.clone(), residual.square().sum(1, keepdim=True)
    goal = tolerance**2 * size
    for _ in range(steps or 4 * b.shape[1] + 10):
        if (size <= goal).all():
            break
        Hd = product(direction)
        curvature = (direction * Hd).sum(1, keepdim=True)
        step = torch.where(size > goal, size / curvature, 0.0)
        v, residual = v + step * direction, residual - step * Hd
        new = residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(size > goal, new / size, 0.0) * direction
        size = new
    return v


def _line_search(problem: Problem, at: Derivatives, batch: Any, Y: Tensor, step: Tensor) -> Tensor:
    """Y - r step, each block's r halved until its loss does not rise."""
    with torch.no_grad():
        before = problem.lower(at.variables, Y, at.idx, batch)
        rate = torch.ones_like(before)
        for _ in range(30):
            rises = problem.lower(at.variables, Y - rate[:, None] * step, at.idx, batch) > before + 1e-12 * before.abs()
            if not rises.any():
                break
            rate = torch.where(rises, rate / 2, rate)
    return Y - rate[:, None] * step


def _all(problem: Problem, *, upper: bool) -> tuple[Tensor, Any]:
    idx = torch.arange(problem.m)
    draw = problem.sample_upper if upper else problem.sample
    return idx, draw(idx, None, torch.Generator())
