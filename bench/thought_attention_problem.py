"""The problems of the thought attention benches, and what float64 says of them.

Letters: B batch, H query heads, G key heads, T positions, P path steps, D head size.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyquiet.kernels.thought_attention import reference

TOLERANCE = 1e-4
# FlashAttention's rule for half precision: at most this many times the error of eager math in the same dtype.
EAGER_ERRORS = 2
# What a baseline may be off in half precision, in terms of what ours may: SDPA's gradients need it.
BASELINE_LEEWAY = 2
ROUNDING = 1e-5

GRADIENTS = ("query", "text key", "text value", "path key", "path value")


@dataclass(frozen=True)
class Shape:
    """One problem size of thought attention over a whole text."""

    positions: int
    steps: int
    batch: int = 2
    heads: int = 8
    kv_heads: int = 8
    head_size: int = 64

    @property
    def name(self) -> str:
        """T and P, then what differs from the usual sizes."""
        usual = Shape(self.positions, self.steps)
        name = f"T{self.positions}-P{self.steps}"
        if self.batch != usual.batch:
            name += f"-B{self.batch}"
        if self.heads != usual.heads:
            name += f"-H{self.heads}"
        if self.kv_heads != self.heads:
            name += f"-G{self.kv_heads}"
        if self.head_size != usual.head_size:
            name += f"-D{self.head_size}"
        return name

    @property
    def rows(self) -> int:
        """Query rows that share one position and one key head: R."""
        return self.heads // self.kv_heads * self.steps

    @property
    def useful_flops(self) -> int:
        """4 D per (query, key) pair that the mask lets through; exp and scaling not counted."""
        t, p = self.positions, self.steps
        pairs = p * t * (t + 1) // 2 + t * p * (p + 1) // 2
        return 4 * self.head_size * pairs * self.batch * self.heads

    @property
    def training_flops(self) -> int:
        """Forward and backward: two products a pair, then five (the scores again, dV, dP, dQ, dK)."""
        return self.useful_flops * 7 // 2

    @property
    def dense_scores(self) -> int:
        t, p = self.positions, self.steps
        return self.batch * self.heads * t * p * (t + t * p)

    @property
    def stepwise_scores(self) -> int:
        t, p = self.positions, self.steps
        return self.batch * self.heads * t * t * p * (p + 3) // 2

    @property
    def eager_scores(self) -> int:
        t, p = self.positions, self.steps
        return self.batch * self.heads * t * p * (t + p)


@dataclass(frozen=True)
class Inputs:
    """The arguments of `pyquiet.kernels.thought_attention` in the layout of its contract."""

    shape: Shape
    query: Tensor  # [B, H, T, P, D]
    text_key: Tensor  # [B, G, T, D]
    text_value: Tensor  # [B, G, T, D]
    path_key: Tensor  # [B, G, T, P, D]
    path_value: Tensor  # [B, G, T, P, D]
    text_limits: Tensor  # [B, T]

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.shape.head_size)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The five floating-point inputs, in the order of `GRADIENTS`."""
        return self.query, self.text_key, self.text_value, self.path_key, self.path_value

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """Return the same problem with every floating-point input changed."""
        return Inputs(self.shape, *map(change, self.tensors), self.text_limits)

    def to(self, device: str) -> "Inputs":
        """Return the same problem on another device."""
        return Inputs(self.shape, *(x.to(device) for x in (*self.tensors, self.text_limits)))

    def key_head(self, b: int, g: int) -> "Inputs":
        """Return the part of the problem that one key head of one sequence makes."""
        keys = (x[b : b + 1, g : g + 1] for x in self.tensors[1:])
        query = self.query[b : b + 1, query_heads(self.shape, g)]
        alone = dataclasses.replace(self.shape, batch=1, heads=query.shape[1], kv_heads=1)
        return Inputs(alone, query, *keys, self.text_limits[b : b + 1])


def query_heads(shape: Shape, g: int) -> slice:
    """Return the query heads that share key head g."""
    group = shape.heads // shape.kv_heads
    return slice(g * group, (g + 1) * group)


def random_inputs(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Inputs:
    """Return standard normal inputs in which position i sees the text up to and with itself."""
    generator = torch.Generator().manual_seed(seed)
    b, h, g, t = shape.batch, shape.heads, shape.kv_heads, shape.positions
    p, d = shape.steps, shape.head_size

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    limits = torch.arange(1, t + 1, device=device).expand(b, t).contiguous()
    text_key, text_value = normal(b, g, t, d), normal(b, g, t, d)
    path_key, path_value = normal(b, g, t, p, d), normal(b, g, t, p, d)
    return Inputs(shape, normal(b, h, t, p, d), text_key, text_value, path_key, path_value, limits)


@dataclass(frozen=True)
class Expected:
    """The exact results of one key head: the output and, where asked for, the five gradients."""

    b: int
    g: int
    exact: tuple[Tensor, ...]
    allowed: tuple[float, ...]  # the largest error that passes, result by result


@dataclass(frozen=True)
class Problem:
    """Inputs, the output's gradient, and what float64 says of the first and of the last key head."""

    inputs: Inputs
    d_out: Tensor | None  # [B, H, T, P, D]; None where only the forward is asked for
    expected: tuple[Expected, ...]

    def error(self, results: Sequence[Tensor], leeway: float = 1) -> float:
        """Return the largest absolute error of the results (the output, then the gradients).

        Raises:
            AssertionError: a result is further from float64 than `leeway` times what it may be.
        """
        largest = 0.0
        for head in self.expected:
            heads = query_heads(self.inputs.shape, head.g)
            keys = slice(head.g, head.g + 1)
            parts = (heads, heads, *4 * (keys,))
            names = ("the output", *(f"the gradient of {name}" for name in GRADIENTS))
            for name, part, result, exact, allowed in zip(
                names, parts, results, head.exact, head.allowed, strict=False
            ):
                error = largest_error(result[head.b : head.b + 1, part], exact)
                assert error <= leeway * allowed, f"{name} is off by {error:.2e}; {leeway * allowed:.2e} is allowed"
                largest = max(largest, error)
        return largest


def leeway(method: str, dtype: torch.dtype) -> float:
    """Return how many times the error that is allowed to ours is allowed to a method."""
    return 1 if method.startswith("pyquiet") or dtype is torch.float32 else BASELINE_LEEWAY


def largest_error(result: Tensor, exact: Tensor) -> float:
    """Return the largest distance between the two; NaN if there is one."""
    return (result.detach().double() - exact).abs().max().item()


def make_problem(
    shape: Shape,
    dtype: torch.dtype,
    *,
    training: bool,
    eager: Callable[[Inputs, Tensor | None], Sequence[Tensor]],
    device: str = "cpu",
) -> Problem:
    """Return a problem whose exact results are the reference's in float64.

    The reference forms all T x P x T scores, so it is given one key head at a time. `eager(inputs, d_out)` returns
    what plain torch makes of them: in half precision its error decides what is allowed.
    """
    inputs = random_inputs(shape, dtype, device)
    d_out = random_inputs(shape, dtype, device, seed=1).query if training else None
    expected = []
    for b, g in ((0, 0), (shape.batch - 1, shape.kv_heads - 1)):
        head = inputs.key_head(b, g)
        d_head = None if d_out is None else d_out[b : b + 1, query_heads(shape, g)]
        exact = exact_results(head, d_head)
        if dtype is torch.float32:
            allowed = tuple(TOLERANCE * max(1.0, x.abs().max().item()) for x in exact)
        else:
            theirs = eager(head, d_head)
            allowed = tuple(EAGER_ERRORS * largest_error(x, y) + ROUNDING for x, y in zip(theirs, exact, strict=True))
        expected.append(Expected(b, g, exact, allowed))
    return Problem(inputs, d_out, tuple(expected))


def exact_results(inputs: Inputs, d_out: Tensor | None) -> tuple[Tensor, ...]:
    """Return the reference's float64 output and, with `d_out`, the five gradients."""
    inputs = inputs.map(lambda x: x.detach().double().requires_grad_(d_out is not None))
    out, _ = reference(*inputs.tensors, text_limits=inputs.text_limits, text_start=None, scale=inputs.scale)
    gradients = () if d_out is None else torch.autograd.grad(out, inputs.tensors, d_out.double())
    return out.detach(), *gradients


@dataclass(frozen=True)
class Method:
    """A way to compute thought attention: `run(*tensors)` is what is timed.

    `tensors` are the inputs in the layout that the method likes best, made from them by differentiable steps before
    the clock starts; `unpack` brings its result to [B, H, T, P, D].
    """

    tensors: tuple[Tensor, ...]
    run: Callable[..., Any]
    unpack: Callable[[Any], Tensor]


# What brings the result of a timed call to the contract's layout: the output, then the gradients, if any.
Unpack = Callable[[Any], tuple[Tensor, ...]]


def forward_of(form: Callable[[Inputs], Method], inputs: Inputs) -> tuple[Callable[[], Any], Unpack]:
    """Return the call that a forward bench times, and what unpacks its result."""
    method = form(inputs)
    return lambda: method.run(*method.tensors), lambda out: (method.unpack(out),)


def training_of(form: Callable[[Inputs], Method], inputs: Inputs, d_out: Tensor) -> tuple[Callable[[], Any], Unpack]:
    """Return the call that a training bench times, forward and backward, and what unpacks its result.

    While the clock runs every tensor, the output's gradient too, is in the method's own layout.
    """
    inputs = inputs.map(lambda x: x.detach().requires_grad_())
    method = form(inputs)
    leaves = tuple(x.detach().requires_grad_() for x in method.tensors)
    # A layout is made of permutations and views: its derivative carries gradients from one to the other.
    out = method.run(*leaves)
    outs = [out] if isinstance(out, Tensor) else out
    packed = torch.autograd.grad(method.unpack(out), outs, d_out)
    d_outs = [torch.empty_like(x).copy_(d) for x, d in zip(outs, packed, strict=True)]
    del out, outs, packed

    def run() -> Any:
        out = method.run(*leaves)
        return out, torch.autograd.grad(out, leaves, d_outs)

    def unpack(result: Any) -> tuple[Tensor, ...]:
        out, gradients = result
        with torch.no_grad():
            out = method.unpack(out)
        return out, *torch.autograd.grad(method.tensors, inputs.tensors, gradients)

    return run, unpack
