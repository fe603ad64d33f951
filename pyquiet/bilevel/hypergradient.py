"""The exact hypergradient of a problem, on all its data: what the stochastic methods are measured by."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyquiet.bilevel.problem import Derivatives, Flat, Problem, check_precise

_NEWTON, _PRODUCTS = 100, 2000  # steps of Newton's method and of conjugate gradients, at most
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # of a block's gradient, where the lower problem is solved


def solve_lower(problem: Problem, x: Any, Y: Tensor, *, tolerance: float | None = None) -> Tensor:
    """y_i(x) of all blocks, [m, d], by Newton's method from Y [m, d] on all data.

    Args:
        tolerance: of a block's gradient, in units of 1 + its first size; None: 1e-10, in float32 1e-5.

    Raises:
        TypeError, ValueError: Y is neither float32 nor float64.
        RuntimeError: a block's gradient does not fall to the tolerance, or its H_i is not positive definite.
    """
    check_precise("Y", Y)
    flat = Flat(x)
    tolerance = _TOLERANCE[Y.dtype] if tolerance is None else tolerance
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
    return conjugate_gradients(lambda v: at.pull(gradient, v)[1], gradient.detach())[0]


def hypergradient(problem: Problem, x: Any, Y: Tensor | None = None, *, exact: bool = True) -> Tensor:
    """The gradient of F at x on all data, [d_x] in the order of x's parts.

    Args:
        Y: [m, d], where Newton's method starts (None: zeros), or with `exact=False` the point to take for y(x).

    H_i^{-1} grad_y f_i is found by conjugate gradients.

    Raises:
        RuntimeError: the lower problem could not be solved, or so ill-conditioned an H_i not be inverted; the message
            has the residual that is left.
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
    v, residual = conjugate_gradients(lambda v: at.pull(gradient, v)[1], gy)
    if (worst := float(residual.max())) > torch.finfo(v.dtype).eps ** 0.5:
        raise RuntimeError(
            f"conjugate gradients leave {worst:.2g} of grad_y f of block {int(residual.argmax())}: its H_i is too "
            "ill-conditioned; regularise g more, scale y, or give x in float64"
        )
    return (gx - at.pull(gradient, v)[0]) / problem.m


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, *, steps: int = _PRODUCTS
) -> tuple[Tensor, Tensor]:
    """The solutions of H_i v_i = b_i, [I, d], for positive definite H_i given by their products with v [I, d].

    Returns:
        v, and what is left of each b_i, |b_i - H_i v_i| / |b_i| [I]: some roundings, unless `steps` ran out or H_i is
        ill-conditioned.

    Raises:
        RuntimeError: an H_i is not positive definite.
    """
    scale = b.abs().amax(1, keepdim=True)
    right = torch.where(scale > 0, b / scale, 0.0)  # or squares might vanish in float32
    v, residual = torch.zeros_like(b), right.clone()
    direction, size = residual.clone(), residual.square().sum(1, keepdim=True)
    goal = (50 * torch.finfo(b.dtype).eps) ** 2 * size
    for _ in range(steps):
        going = size > goal
        if not going.any():
            break
        Hd = product(direction)
        curvature = (direction * Hd).sum(1, keepdim=True)
        if bool((going & ~(curvature > 0)).any()):
            block = int((going & ~(curvature > 0)).nonzero()[0, 0])
            raise RuntimeError(f"lower: H of block {block} is not positive definite; is g strongly convex in y?")
        step = torch.where(going, size / curvature, 0.0)
        v, residual = v + step * direction, residual - step * Hd
        new = residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(going, new / size, 0.0) * direction
        size = new
    left = (right - product(v)).norm(dim=1) / right.norm(dim=1).clamp_min(1)
    return v * scale, left


def _line_search(problem: Problem, at: Derivatives, batch: Any, Y: Tensor, step: Tensor) -> Tensor:
    """Y - r step, each block's r halved until its loss does not rise."""
    rounding = 100 * torch.finfo(Y.dtype).eps
    with torch.no_grad():
        before = problem.lower(at.variables, Y, at.idx, batch)
        rate = torch.ones_like(before)
        for _ in range(30):
            after = problem.lower(at.variables, Y - rate[:, None] * step, at.idx, batch)
            rises = after > before + rounding * before.abs()
            if not rises.any():
                break
            rate = torch.where(rises, rate / 2, rate)
    return Y - rate[:, None] * step


def _all(problem: Problem, *, upper: bool) -> tuple[Tensor, Any]:
    idx = torch.arange(problem.m)
    draw = problem.sample_upper if upper else problem.sample
    return idx, draw(idx, None, torch.Generator())
