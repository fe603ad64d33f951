"""The exact hypergradient, and the derivatives that all methods are made of, against dense Jacobians."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyquiet.bilevel import BlockwiseProblem, hypergradient, solve_lower
from pyquiet.bilevel.hypergradient import conjugate_gradients
from pyquiet.bilevel.problem import Derivatives, Flat

from .quadratics import Quadratics

X = {"scale": torch.tensor([0.3, -0.2], dtype=torch.float64), "shift": torch.tensor(0.1, dtype=torch.float64)}


def lower(x: Any, y: Tensor, batch: Tensor) -> Tensor:
    """Not quadratic, coupled with x, strongly convex in y."""
    inner = batch @ torch.cat([x["scale"], x["shift"][None]])
    return torch.logaddexp(y * inner[:3], torch.zeros(())).sum() + (1 + x["shift"].square()) * y.square().sum()


def upper(x: Any, y: Tensor, batch: Tensor) -> Tensor:
    return (y - batch[:3, 0]).square().sum() + x["scale"].square().sum() * y.exp().sum() / 10


def curved() -> BlockwiseProblem:
    data = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return BlockwiseProblem(lower, upper, lambda idx, samples, generator: data[idx], m=5, dim_y=3)


def test_it_is_that_of_the_closed_form() -> None:
    problem = Quadratics(6, 5, 4)
    x = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(hypergradient(problem, x), problem.gradient(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        solve_lower(problem, x, torch.zeros(6, 4).double()), problem.best_y(x), rtol=1e-10, atol=1e-10
    )


def test_it_is_that_of_finite_differences_sign_included() -> None:
    problem = curved()
    idx, batch = torch.arange(5), problem.sample(torch.arange(5), None, torch.Generator())

    def objective(vector: Tensor) -> Tensor:
        x = Flat(X).unflatten(vector)
        Y = solve_lower(problem, x, torch.zeros(5, 3).double(), tolerance=1e-13)
        return problem.upper(x, Y, idx, batch).mean()

    at, step = Flat(X).vector, 1e-5
    units = torch.eye(3, dtype=torch.float64) * step
    expected = torch.stack([(objective(at + e) - objective(at - e)) / (2 * step) for e in units])
    found = hypergradient(problem, X)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert float((found + expected).norm()) > 0.1  # with the sign turned it would not pass


def test_one_product_gives_what_dense_jacobians_give() -> None:
    problem = curved()
    generator = torch.Generator().manual_seed(2)
    idx, flat = torch.tensor([3, 0, 4]), Flat(X)
    Y, v = (torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
    batch = problem.sample(idx, 1, generator)
    at = Derivatives(problem, flat, flat.vector, Y, idx)
    gradient = at.gradient(batch)
    jv, hv = at.pull(gradient, v, weights)
    expected_jv, expected_hv = torch.zeros(3, dtype=torch.float64), []
    for i in range(3):

        def grad_y(x: Tensor, y: Tensor, i: int = i) -> Tensor:
            return torch.func.grad(lambda y: lower(flat.unflatten(x), y, batch[i]))(y)

        J, H = torch.func.jacrev(grad_y, argnums=(0, 1))(flat.vector, Y[i])
        expected_jv = expected_jv + weights[i] * J.T @ v[i]
        expected_hv.append(H @ v[i])
        torch.testing.assert_close(at.hessian(gradient)[i], H, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(jv, expected_jv, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(hv, torch.stack(expected_hv), rtol=1e-12, atol=1e-13)


def test_losses_of_one_block_are_lifted_over_points_too() -> None:
    problem = curved()
    generator, idx = torch.Generator().manual_seed(2), torch.tensor([3, 0])
    Y = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
    x = {name: torch.stack([part, 1 - part]) for name, part in X.items()}
    batch = problem.sample(idx, 1, generator)
    for lifted, one in ((problem.lower, lower), (problem.upper, upper)):
        expected = [[one({k: v[p] for k, v in x.items()}, Y[p, i], batch[i]) for i in range(2)] for p in range(2)]
        torch.testing.assert_close(lifted(x, Y, idx, batch), torch.stack([torch.stack(row) for row in expected]))


def test_conjugate_gradients_solve_every_block() -> None:
    A = torch.diag_embed(torch.tensor([[1.0, 2.0, 50.0], [3.0, 3.0, 3.0]], dtype=torch.float64))
    b = torch.tensor([[1.0, -1.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found, residual = conjugate_gradients(lambda v: (A @ v[..., None])[..., 0], b)
    assert float(residual.max()) < 1e-14
    torch.testing.assert_close(found, torch.linalg.solve(A, b[..., None])[..., 0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [1.0, 1e-25])
def test_conjugate_gradients_end_in_float32(size: float) -> None:
    """At its own rounding, also where squares vanish."""
    A = torch.diag_embed(torch.tensor([[1.0, 2.0, 50.0, 7.0]]))
    b, products = size * torch.tensor([[1.0, -1.0, 2.0, 3.0]]), []

    def product(v: Tensor) -> Tensor:
        products.append(v)
        return (A @ v[..., None])[..., 0]

    found, residual = conjugate_gradients(product, b)
    assert len(products) <= 6
    assert float(residual.max()) < 1e-5
    torch.testing.assert_close(found / size, torch.tensor([[1.0, -0.5, 0.04, 3 / 7]]), rtol=1e-5, atol=0)


def test_what_conjugate_gradients_leave_is_told() -> None:
    """By a Hilbert matrix, whose condition number is 1e17, and by steps that ran out."""
    places = torch.arange(12, dtype=torch.float64)
    hilbert = 1 / (places[:, None] + places + 1)
    b = torch.randn(1, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v, residual = conjugate_gradients(lambda v: v @ hilbert, b, steps=20)
    torch.testing.assert_close(residual, (b - v @ hilbert).norm(dim=1) / b.norm(), rtol=1e-5, atol=0)
    assert float(residual.max()) > 1e-4
    with pytest.raises(RuntimeError, match="H of block 1 is not positive definite"):
        conjugate_gradients(lambda v: v * torch.tensor([[1.0], [-1.0]]), torch.ones(2, 3))


def test_a_hypergradient_behind_an_ill_conditioned_lower_problem_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Quadratics(3, 5, 4)
    monkeypatch.setitem(conjugate_gradients.__kwdefaults__, "steps", 2)  # of the four that its dimensions take
    with pytest.raises(RuntimeError, match=r"conjugate gradients leave .* of grad_y f of block \d: its H_i is too ill"):
        hypergradient(problem, torch.ones(5).double(), torch.zeros(3, 4).double(), exact=False)


def test_it_is_there_in_float32() -> None:
    problem = Quadratics(6, 5, 4)
    x = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = problem.gradient(x)
    for name in ("A", "C", "b", "t"):
        setattr(problem, name, getattr(problem, name).float())
    draw = problem.sample
    problem.sample = lambda *given: {name: z.float() for name, z in draw(*given).items()}  # type: ignore[method-assign]
    torch.testing.assert_close(hypergradient(problem, x.float()), expected.float(), rtol=1e-4, atol=1e-5)


def test_a_lower_problem_without_a_minimum_is_told() -> None:
    problem = BlockwiseProblem(
        lambda x, y, batch: y.sum() * x.square().sum(), lambda x, y, batch: y.sum(),
        lambda idx, samples, generator: torch.zeros(len(idx)), m=2, dim_y=1,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="is g strongly convex in y"):
        hypergradient(problem, torch.ones(2, dtype=torch.float64))


def test_a_start_in_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Y is torch\.bfloat16"):
        solve_lower(curved(), X, torch.zeros(5, 3).bfloat16())


def test_losses_of_the_wrong_shape_are_told() -> None:
    class Wrong(Quadratics):
        def upper(self, x: Any, Y: Tensor, idx: Tensor, batch: Any) -> Tensor:
            return super().upper(x, Y, idx, batch).mean()

    with pytest.raises(ValueError, match=r"problem.upper must return one loss a block, \[3\], got \[\]"):
        hypergradient(Wrong(3, 2, 2), torch.zeros(2, dtype=torch.float64))


def test_parts_of_x_lie_in_one_vector_and_come_back() -> None:
    module = torch.nn.Linear(3, 2).double()
    flat = Flat(module)
    parts = flat.unflatten(flat.vector)
    assert isinstance(parts, dict)
    assert {name: part.shape for name, part in parts.items()} == {"weight": (2, 3), "bias": (2,)}
    flat.write_back(flat.vector + 1)
    torch.testing.assert_close(module.bias, flat.vector[-2:] + 1)
    with pytest.raises(
        TypeError,
        match="x must be a tensor, a dict of tensors or a module with parameters that require a gradient, got int",
    ):
        Flat(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        Flat(torch.ones(2, dtype=torch.int64))
