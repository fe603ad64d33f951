"""Multi-block bilevel problems and their derivatives (arXiv 2305.18730).

    min over x of F(x) = 1/m sum_i f_i(x, y_i(x)),  y_i(x) = argmin over y of g_i(x, y),  i = 1 .. m

x is shared, y_i belongs to block i, and g_i is strongly convex in y. With H_i and J_i the derivatives of grad_y g_i in
y and in x, the gradient of F (the hypergradient) is the mean over blocks of grad_x f_i - J_i^T H_i^{-1} grad_y f_i.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import grad

Variables = Tensor | dict[str, Tensor]


class Problem(ABC):
    """A multi-block bilevel problem, as losses of some of its blocks at a time.

    Letters: m blocks, of which a call sees I, those of `idx` int64 [I], distinct; d = `dim_y`.

    `lower` and `upper` return the losses g_i and f_i [I] at `x` (a tensor or a dict of tensors, as the optimiser was
    given them) and Y [I, d]; loss i may depend on row i of Y alone. They are evaluated at two points with the same
    batch and the same state of torch's random generator.

    Where `points` is set, they also take P points at once, x's parts [P, ...] and Y [P, I, d], and then return [P, I]:
    a step evaluates both of its points in one pass, which takes small problems little longer than one of them.
    """

    m: int
    dim_y: int
    points: bool = False

    @abstractmethod
    def lower(self, x: Any, Y: Tensor, idx: Tensor, batch: Any) -> Tensor:
        """The losses g_i [I], on the samples of `batch`."""

    @abstractmethod
    def upper(self, x: Any, Y: Tensor, idx: Tensor, batch: Any) -> Tensor:
        """The losses f_i [I]."""

    @abstractmethod
    def sample(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> Any:
        """So many samples of each block for `lower`, drawn by `generator` (on the CPU); all that there are for None."""

    def sample_upper(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> Any:
        """The same for `upper`, where its data are others; they are drawn independently in any case."""
        return self.sample(idx, samples, generator)


class BlockwiseProblem(Problem):
    """A problem given by the losses of one block: (x, y [d], batch of the block) -> [], lifted over blocks by vmap,
    and over the points of a step.

    Args:
        lower, upper: the losses of one block.
        sample: as `Problem.sample`; what it returns has blocks as the first dimension of all its tensors.
        sample_upper: None is `sample`.
    """

    points = True

    def __init__(
        self,
        lower: Callable[[Any, Tensor, Any], Tensor],
        upper: Callable[[Any, Tensor, Any], Tensor],
        sample: Callable[[Tensor, int | None, torch.Generator], Any],
        *,
        m: int,
        dim_y: int,
        sample_upper: Callable[[Tensor, int | None, torch.Generator], Any] | None = None,
    ) -> None:
        self.m, self.dim_y = m, dim_y
        self._lower, self._upper = (_over_blocks(loss) for loss in (lower, upper))
        self._sample, self._sample_upper = sample, sample if sample_upper is None else sample_upper

    def lower(self, x: Any, Y: Tensor, idx: Tensor, batch: Any) -> Tensor:
        return self._lower(x, Y, batch)

    def upper(self, x: Any, Y: Tensor, idx: Tensor, batch: Any) -> Tensor:
        return self._upper(x, Y, batch)

    def sample(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> Any:
        return self._sample(idx, samples, generator)

    def sample_upper(self, idx: Tensor, samples: int | None, generator: torch.Generator) -> Any:
        return self._sample_upper(idx, samples, generator)


def _over_blocks(loss: Callable[[Any, Tensor, Any], Tensor]) -> Callable[[Any, Tensor, Any], Tensor]:
    one = torch.func.vmap(loss, in_dims=(None, 0, 0), randomness="same")
    several = torch.func.vmap(one, in_dims=(0, 0, None), randomness="same")
    return lambda x, Y, batch: (one if Y.ndim == 2 else several)(x, Y, batch)


def row_scores(features: Tensor, Y: Tensor) -> Tensor:
    """features_ij . y_i [..., I, B] of rows [I, B, d] and Y [..., I, d], as products of matrices.

    A block's y is a row: torch multiplies many small matrices by a column four times as slowly as by a row.
    """
    several = Y.reshape(-1, *Y.shape[-2:]).transpose(0, 1)  # [I, points, d]
    return (several @ features.mT).transpose(0, 1).reshape(*Y.shape[:-1], -1)


class Flat:
    """How variables of any structure lie in one vector.

    Of a module these are the parameters that require a gradient; `functional_call` takes the others from the module.

    Raises:
        TypeError: x is neither a tensor, nor a dict of tensors, nor a module with parameters, or not floating point.
        ValueError: it is in half precision, in which differences of gradients are lost.
    """

    def __init__(self, x: Tensor | Mapping[str, Tensor] | nn.Module) -> None:
        parts: Any = {"": x} if isinstance(x, Tensor) else x
        if isinstance(x, nn.Module):
            parts = {name: value for name, value in x.named_parameters() if value.requires_grad}
        if not isinstance(parts, Mapping) or not parts or not all(isinstance(part, Tensor) for part in parts.values()):
            raise TypeError(
                "x must be a tensor, a dict of tensors or a module with parameters that require a gradient, got "
                f"{type(x).__name__}"
            )
        for name, part in parts.items():
            check_precise(f"x {name}".strip(), part)
        self.module = x if isinstance(x, nn.Module) else None
        self.single = isinstance(x, Tensor)
        self.shapes = {name: part.shape for name, part in parts.items()}
        self.vector = torch.cat([part.detach().flatten() for part in parts.values()])

    def unflatten(self, vector: Tensor) -> Variables:
        """The parts of a vector [..., d_x], as views of it, [..., *shape of the part]."""
        pieces, points = vector.split([shape.numel() for shape in self.shapes.values()], -1), vector.shape[:-1]
        parts = {name: x.view(points + shape) for (name, shape), x in zip(self.shapes.items(), pieces, strict=True)}
        return parts[""] if self.single else parts

    def write_back(self, vector: Tensor) -> None:
        """Copies the vector into the module that x came from, if it did."""
        if self.module is not None:
            parts = cast(dict[str, Tensor], self.unflatten(vector))
            with torch.no_grad():
                for name, part in parts.items():
                    self.module.get_parameter(name).copy_(part)


def check_precise(name: str, value: Tensor) -> None:
    """Raises TypeError or ValueError unless the tensor is float32 or float64.

    The method amplifies differences of two gradients; in bfloat16 these are mostly rounding.
    """
    if not value.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} is {value.dtype}, in which the differences of gradients that this method amplifies are lost; "
            "give float32 or float64"
        )


class Derivatives:
    """The derivatives of some blocks at a point (vector of x, Y [I, d]), in one graph; what is asked for, is computed.

    Of a problem with `points` also at several, (x [P, d_x], Y [P, I, d]); all shapes below then begin with P.

    One vector-Jacobian product of grad_y g with v gives both J^T v, summed over blocks, and each H_i v_i, since loss i
    depends on row i alone. Backward passes go through the functions of `problem` twice: fused attention cannot.
    Where there are no blocks (a process without any), the problem is not called and sums are 0.
    """

    def __init__(self, problem: Problem, flat: Flat, x: Tensor, Y: Tensor, idx: Tensor) -> None:
        self.problem, self.idx = problem, idx
        self.x, self.Y = x.detach().requires_grad_(), Y.detach().requires_grad_()
        self.upper_Y = Y.detach().requires_grad_()  # a leaf of its own, so that one pass tells grad_y f from H v
        self.variables = flat.unflatten(self.x)

    def upper(self, batch: Any, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """sum_i grad_x f_i [d_x], each f_i with its weight, and grad_y f_i [I, d] without."""
        losses = self._losses("upper", self.upper_Y, batch)
        seed = torch.ones_like(losses) if weights is None else weights.expand_as(losses)
        gx, gy = grad(losses, (self.x, self.upper_Y), seed, materialize_grads=True)
        return gx, gy if weights is None else gy / weights[:, None]

    def gradient(self, batch: Any) -> Tensor:
        """grad_y g_i [I, d], to be differentiated."""
        losses = self._losses("lower", self.Y, batch)
        (gy,) = grad(losses, self.Y, torch.ones_like(losses), create_graph=True)
        return gy

    def direction(self, gradient: Tensor, batch: Any, v: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sum_i w_i (grad_x f_i - J_i^T v_i) [d_x], grad_y f_i and H_i v_i [I, d], by one backward pass."""
        losses = self._losses("upper", self.upper_Y, batch)
        outputs, seeds = [losses], [weights.expand_as(losses)]
        if gradient.requires_grad:
            outputs, seeds = [losses, gradient], [*seeds, -weights[:, None] * v]
        leaves = (self.x, self.upper_Y, self.Y)
        gx, gy, hv = grad(outputs, leaves, seeds, materialize_grads=True)
        return gx, gy / weights[:, None], hv / -weights[:, None]

    def pull(self, gradient: Tensor, v: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """sum_i w_i J_i^T v_i [d_x] and H_i v_i [I, d]."""
        if not gradient.requires_grad:  # g is linear in y and does not couple it with x
            return torch.zeros_like(self.x), torch.zeros_like(self.Y)
        scaled = v if weights is None else v * weights[:, None]
        jv, hv = grad(gradient, (self.x, self.Y), scaled, retain_graph=True, materialize_grads=True)
        return jv, hv if weights is None else hv / weights[:, None]

    def hessian(self, gradient: Tensor) -> Tensor:
        """H_i [I, d, d]."""
        d = self.Y.shape[-1]
        if not gradient.requires_grad:
            return self.Y.new_zeros(*self.Y.shape, d)
        rows = torch.eye(d, dtype=self.Y.dtype, device=self.Y.device).view(d, *[1] * (self.Y.ndim - 1), d)
        (H,) = grad(
            gradient, self.Y, rows.expand(-1, *self.Y.shape), retain_graph=True, materialize_grads=True,
            is_grads_batched=True,
        )  # fmt: skip  # [d, I, d]
        return H.movedim(0, -2)

    def _losses(self, which: str, Y: Tensor, batch: Any) -> Tensor:
        if not len(self.idx):
            return Y.sum(-1)
        losses: Tensor = getattr(self.problem, which)(self.variables, Y, self.idx, batch)
        if losses.shape != Y.shape[:-1]:
            raise ValueError(
                f"problem.{which} must return one loss a block, {list(Y.shape[:-1])}, got {list(losses.shape)}"
            )
        check_precise(f"problem.{which}'s loss", losses)
        if torch.is_autocast_enabled(losses.device.type):
            raise ValueError(f"problem.{which} runs under torch.autocast, which rounds gradients; step outside of it")
        if not losses.requires_grad:
            raise ValueError(f"problem.{which}'s losses depend on neither x nor Y (were they detached?)")
        return losses
