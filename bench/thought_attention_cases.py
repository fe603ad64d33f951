"""What the thought attention benches on the CPU have in common: their cases, checks and rows."""

import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import thought_attention_baselines as baselines
from .machine import Machine
from .memory import peak_mib
from .thought_attention_problem import Problem, Shape, forward_of, leeway, make_problem, training_of
from .timing import best_seconds

EAGER_METHODS = ("pyquiet", "dense", "stepwise", "decomposition", "eager", "blocked")
# The kernel on the same values in float32: a row of the bfloat16 tables.
OWN_FLOAT32 = "pyquiet float32"


def cases(shapes: Iterable[Shape], dtype: torch.dtype, compiled: dict[Shape, tuple[str, ...]]) -> list[Any]:
    """Return every (shape, dtype, method), shape by shape, so that a shape's rows are timed together."""
    word = "" if dtype is torch.float32 else f"-{name_of(dtype)}"
    own = () if dtype is torch.float32 else (OWN_FLOAT32,)
    return [
        pytest.param(shape, dtype, method, id=f"{shape.name}{word}-{method.replace(' ', '-')}")
        for shape in shapes
        for method in (*EAGER_METHODS[:1], *own, *EAGER_METHODS[1:], *compiled.get(shape, ()))
    ]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=1)
def problem(shape: Shape, dtype: torch.dtype, training: bool) -> Problem:
    """Return the problem that all methods of a shape are given, one after the other."""
    return make_problem(shape, dtype, training=training, eager=baselines.eager_results)


def skip_above(method: str, shape: Shape, most: int) -> None:
    """Skip a method that would form more than `most` scores at once."""
    scores = baselines.scores(method, shape)
    if scores > most:
        pytest.skip(f"{scores:.1e} scores at once are above {most:.1e}")


def measure(
    benchmark: BenchmarkFixture, machine: Machine, shape: Shape, dtype: torch.dtype, method: str, *,
    training: bool, budget: float,
) -> None:  # fmt: skip
    """Check a method against float64, time it, and leave its row in `extra_info`."""
    passes = "forward and backward" if training else "forward"
    table = f"thought attention, {passes}" + ("" if dtype is torch.float32 else f", {name_of(dtype)}")
    benchmark.group = f"{table} {shape.name}"
    given = problem(shape, dtype, training)
    inputs, d_out, form = given.inputs, given.d_out, baselines.METHODS[method.removesuffix(" float32")]
    if method == OWN_FLOAT32:
        inputs = inputs.map(torch.Tensor.float)
        d_out = None if d_out is None else d_out.float()
    # Without this the second shape would reuse or outgrow the compiled code of the first.
    torch.compiler.reset()
    with torch.set_grad_enabled(training):
        run, unpack = training_of(form, inputs, d_out) if training else forward_of(form, inputs)
        error = given.error(unpack(run()), leeway(method, dtype))
        seconds = best_seconds(benchmark, run, budget)
        if training:
            benchmark.extra_info["peak_mib"] = peak_mib(run)
    flops = shape.training_flops if training else shape.useful_flops
    gflops = flops / seconds * 1e-9
    peak = machine.fma_gflops
    if peak and machine.bf16_gflops and dtype is torch.bfloat16 and method != OWN_FLOAT32:
        # Where vdpbf16ps is the slower of the two, converting and fp32 arithmetic is the way to go.
        peak = max(peak, machine.bf16_gflops)
    benchmark.extra_info.update(
        table=table,
        shape=shape.name,
        method=method,
        seconds=seconds,
        error=error,
        gflops=gflops,
        of_peak=gflops / peak if peak else None,
    )
