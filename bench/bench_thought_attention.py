"""Thought attention, forward: the kernel against what a user would otherwise write.

Every method's result is checked against the float64 reference before it is timed.
"""

import functools
import math
import timeit
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional

from pyquiet.kernels import thought_attention
from pyquiet.kernels.thought_attention import reference
from pyquiet.native import cpu

from . import thought_attention_baselines as baselines
from .machine import Machine
from .thought_attention_baselines import Inputs, Method, Shape
from .timing import best_seconds

TOLERANCE = 1e-4

GRID = [Shape(t, p) for t in (128, 256, 512, 1024) for p in (1, 4, 8, 16)]
GROUPED = Shape(256, 8, kv_heads=2)
# Compiling takes up to a minute each, so these four shapes alone have compiled baselines.
COMPILED = {Shape(128, 4), Shape(256, 8), Shape(512, 8), Shape(1024, 16)}

EAGER_METHODS = ("pyquiet", "dense", "stepwise", "decomposition", "blocked")
COMPILED_METHODS = ("flex-32", "flex-16", "compiled blocked")


def kernel(inputs: Inputs) -> Method:
    """Return the public function on the layout of its contract."""
    tensors = (inputs.query, inputs.text_key, inputs.text_value, inputs.path_key, inputs.path_value)
    limits, scale = inputs.text_limits, inputs.scale
    return Method(
        run=lambda: thought_attention(*tensors, text_limits=limits, scale=scale),
        unpack=lambda out: out,
    )


METHODS: dict[str, Callable[[Inputs], Method]] = {
    "pyquiet": kernel,
    "dense": baselines.dense,
    "stepwise": baselines.stepwise,
    "decomposition": baselines.decomposition,
    "blocked": baselines.blocked,
    "flex-32": functools.partial(baselines.flex, block_size=32),
    "flex-16": functools.partial(baselines.flex, block_size=16),
    "compiled blocked": baselines.compiled_blocked,
}


def cases() -> list[Any]:
    """Return every (shape, method), shape by shape, so that a shape's rows are timed together."""
    found = []
    for shape in [*GRID, GROUPED]:
        for method in (*EAGER_METHODS, *(COMPILED_METHODS if shape in COMPILED else ())):
            found.append(pytest.param(shape, method, id=f"{shape.name}-{method.replace(' ', '-')}"))
    return found


@functools.lru_cache(maxsize=1)
def problem(shape: Shape) -> tuple[Inputs, list[tuple[int, slice, Tensor]]]:
    """Return the inputs and, for the first and the last KV head, (b, query heads, float64 result).

    The reference forms all T x P x T scores, so it is given one KV head at a time.
    """
    inputs = baselines.random_inputs(shape)
    keys = (inputs.text_key, inputs.text_value, inputs.path_key, inputs.path_value)
    group = shape.heads // shape.kv_heads
    expected = []
    for b, g in ((0, 0), (shape.batch - 1, shape.kv_heads - 1)):
        heads = slice(g * group, (g + 1) * group)
        exact, _ = reference(
            inputs.query[b : b + 1, heads].double(),
            *(x[b : b + 1, g : g + 1].double() for x in keys),
            text_limits=inputs.text_limits[b : b + 1],
            text_start=None,
            scale=inputs.scale,
        )
        expected.append((b, heads, exact[0]))
    return inputs, expected


@pytest.mark.parametrize(("shape", "method"), cases())
def test_forward(benchmark: BenchmarkFixture, machine: Machine, shape: Shape, method: str) -> None:
    scores = {"dense": shape.dense_scores, "stepwise": shape.stepwise_scores}.get(method, 0)
    if scores > baselines.MAX_DENSE_SCORES:
        pytest.skip(f"{scores:.1e} masked scores are above {baselines.MAX_DENSE_SCORES:.1e}")
    benchmark.group = f"thought attention {shape.name}"
    inputs, expected = problem(shape)
    # Without this the second shape would reuse or outgrow the compiled code of the first.
    torch.compiler.reset()
    with torch.no_grad():
        prepared = METHODS[method](inputs)
        out = prepared.unpack(prepared.run())
        error = max((out[b, heads] - exact).abs().max().item() for b, heads, exact in expected)
        del out
        assert error < TOLERANCE
        seconds = best_seconds(benchmark, prepared.run)
    gflops = shape.useful_flops / seconds * 1e-9
    benchmark.extra_info.update(
        table="thought attention, forward",
        shape=shape.name,
        method=method,
        seconds=seconds,
        error=error,
        gflops=gflops,
        of_peak=gflops / machine.fma_gflops if machine.fma_gflops else None,
    )


DECODE_STEPS = 7  # START, five tokens and END: the last query of a thought sees the longest path


def decode_inputs(batch: int, text: int, kv_heads: int) -> tuple[Tensor, ...]:
    """Return query, text keys and values, path keys and values of one cached generation step."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((8, 1, 1), (kv_heads, text), (kv_heads, text), *2 * ((kv_heads, 1, DECODE_STEPS),))
    return tuple(torch.randn(batch, *size, 64, generator=generator) for size in sizes)


def decode_method(method: str, tensors: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """Return one decoding step: the kernel on two caches, or plain torch on one joined cache."""
    q, text_key, text_value, path_key, path_value = tensors
    scale = 1 / math.sqrt(q.shape[-1])
    if method == "pyquiet":
        limits = torch.full((q.shape[0], 1), text_key.shape[2])
        return lambda: thought_attention(*tensors, text_limits=limits, scale=scale)
    query = q[:, :, 0]
    k = torch.cat([text_key, path_key[:, :, 0]], 2)
    v = torch.cat([text_value, path_value[:, :, 0]], 2)
    if method == "sdpa":
        grouped = q.shape[1] != k.shape[1]
        return lambda: functional.scaled_dot_product_attention(query, k, v, enable_gqa=grouped)
    rows = query.view(q.shape[0], k.shape[1], -1, q.shape[-1])  # [B, G, H / G, D]
    keys = k.mT.contiguous()
    return lambda: (rows @ keys).mul_(scale).softmax(-1) @ v


@pytest.mark.parametrize("method", ["pyquiet", "sdpa", "matmul"])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("text", [400, 2000])
@pytest.mark.parametrize("batch", [1, 8])
def test_decode(
    benchmark: BenchmarkFixture, machine: Machine, batch: int, text: int, kv_heads: int, method: str
) -> None:
    name = f"B{batch}-S{text}-G{kv_heads}"
    benchmark.group = f"thought attention, one decoding step {name}"
    tensors = decode_inputs(batch, text, kv_heads)
    run = decode_method(method, tensors)
    exact, _ = reference(
        *(x.double() for x in tensors),
        text_limits=torch.full((batch, 1), text),
        text_start=None,
        scale=1 / 8,
    )
    with torch.no_grad():
        error = (run().reshape(exact.shape).double() - exact).abs().max().item()
        assert error < TOLERANCE
        seconds = best_seconds(benchmark, run, budget=0.3)
    benchmark.extra_info.update(
        table="thought attention, one decoding step",
        shape=name,
        method=method,
        seconds=seconds,
        error=error,
        read_gbs=sum(x.nbytes for x in tensors) / seconds * 1e-9,
    )


@pytest.mark.skipif(cpu is None, reason="the native module is not built")
def test_wrapper_overhead(benchmark: BenchmarkFixture, machine: Machine) -> None:
    """The public function on one tiny query less the bare native call, on one thread."""
    q = torch.randn(1, 1, 1, 1, 8)
    k = torch.randn(1, 1, 1, 8)
    limits, out = torch.ones(1, 1, dtype=torch.int64), torch.empty_like(q)
    calls, threads = 5000, torch.get_num_threads()

    def bare() -> bool:
        return cpu.thought_attention(q, k, k, q, q, limits, None, out, None, 1.0, 0, 0.0, 1)

    def public() -> Tensor:
        return thought_attention(q, k, k, q, q, text_limits=limits, scale=1.0)

    assert bare()
    torch.testing.assert_close(public(), out, rtol=0, atol=0)
    torch.set_num_threads(1)
    try:
        benchmark.pedantic(public, rounds=30, iterations=calls, warmup_rounds=1)
        native = min(timeit.repeat(bare, number=calls, repeat=30)) / calls
    finally:
        torch.set_num_threads(threads)
    total = benchmark.stats.stats.min
    benchmark.extra_info.update(
        table="overhead of a call",
        public_microseconds=total * 1e6,
        native_microseconds=native * 1e6,
        wrapper_microseconds=(total - native) * 1e6,
    )
