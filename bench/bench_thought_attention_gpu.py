"""Thought attention on a CUDA device: the kernel against what a user would otherwise write.

Every result, gradients too, is checked against the float64 reference before it is timed.
"""

import functools
import importlib.util
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import thought_attention_baselines as baselines
from .cuda import Gpu, median_seconds, peak_mib
from .thought_attention_cases import name_of
from .thought_attention_problem import Inputs, Method, Problem, Shape, forward_of, leeway, make_problem, training_of

pytestmark = pytest.mark.gpu

# A call above this takes some tenths of a second, its mask some GiB.
MAX_SCORES = 2**35
HEADS_128 = {"heads": 16, "kv_heads": 16, "head_size": 128}
SHAPES = {
    torch.bfloat16: [
        Shape(128, 4, batch=32),
        Shape(256, 8, batch=32),
        Shape(256, 8, batch=32, kv_heads=2),
        Shape(512, 8, batch=32),
        Shape(1024, 16, batch=4, **HEADS_128),
        Shape(2048, 16, batch=2, **HEADS_128),
    ],
    torch.float32: [Shape(256, 8, batch=32), Shape(1024, 8, batch=8)],
}
# Trying every tile takes torch a minute, and smaller blocks pay for short texts alone.
TUNED = (torch.bfloat16, Shape(256, 8, batch=32))

METHODS: dict[str, Callable[[Inputs], Method]] = {
    **{name: baselines.METHODS[name] for name in ("pyquiet", "dense", "decomposition", "eager")},
    "blocked": functools.partial(baselines.eager, block=128),  # larger than on a CPU: each block costs its launches
    "flex-128": functools.partial(baselines.flex, block_size=128),
    "flex-64 tuned": functools.partial(baselines.flex, block_size=64, mode="max-autotune-no-cudagraphs"),
}


def cases() -> list[object]:
    """Return every (shape, dtype, method), shape by shape, so that a shape's rows are timed together."""
    found = []
    for dtype, shapes in SHAPES.items():
        for shape in shapes:
            for method in METHODS:
                if method == "flex-64 tuned" and (dtype, shape) != TUNED:
                    continue
                if method == "decomposition" and dtype is torch.float32:
                    continue  # torch has no float32 flash attention on CUDA
                name = f"{shape.name}-{name_of(dtype)}-{method.replace(' ', '-')}"
                found.append(pytest.param(shape, dtype, method, id=name))
    return found


@functools.lru_cache(maxsize=1)
def problem(shape: Shape, dtype: torch.dtype) -> Problem:
    """Return the problem that all methods of a shape are given, one after the other."""
    return make_problem(shape, dtype, training=True, eager=baselines.eager_results, device="cuda")


def least_bytes(shape: Shape, dtype: torch.dtype, training: bool) -> int:
    """Return the bytes of inputs and results, each moved once a pass; the backward reads inputs and output again."""
    query = shape.batch * shape.heads * shape.positions * shape.steps * shape.head_size
    keys = 2 * shape.batch * shape.kv_heads * shape.positions * (1 + shape.steps) * shape.head_size
    forward = 2 * query + keys
    backward = forward + query + (query + keys)  # d_out read, five gradients written
    return (forward + training * backward) * dtype.itemsize


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(("shape", "dtype", "method"), cases())
def test_device(
    benchmark: BenchmarkFixture, gpu: Gpu, shape: Shape, dtype: torch.dtype, method: str, training: bool
) -> None:
    if method == "pyquiet" and importlib.util.find_spec("pyquiet._cuda") is None:
        pytest.skip("pyquiet._cuda is not built: only the reference would be timed")
    if baselines.scores(method, shape) > MAX_SCORES:
        pytest.skip(f"{baselines.scores(method, shape):.1e} scores at once are above {MAX_SCORES:.1e}")
    given = problem(shape, dtype)
    torch.compiler.reset()
    with torch.set_grad_enabled(training):
        form = METHODS[method]
        run, unpack = training_of(form, given.inputs, given.d_out) if training else forward_of(form, given.inputs)
        error = given.error(unpack(run()), leeway(method, dtype))
        seconds = median_seconds(benchmark, run)
        peak = peak_mib(run)
    tflops = (shape.training_flops if training else shape.useful_flops) / seconds * 1e-12
    gbs = least_bytes(shape, dtype, training) / seconds * 1e-9
    passes = "forward and backward" if training else "forward"
    benchmark.extra_info.update(
        table=f"thought attention on {gpu.name}, {passes}, {name_of(dtype)}",
        shape=shape.name,
        method=method,
        seconds=seconds,
        error=error,
        gflops=tflops * 1e3,
        of_peak=tflops / gpu.matmul_tflops[name_of(dtype)],
        moved_gbs=gbs,
        of_copy=gbs / gpu.copy_gbs,
        peak_mib=peak,
    )
