"""Thought attention, forward: the kernel against what a user would otherwise write.

Every method's result is checked against the float64 reference before it is timed.
"""

import math
import timeit
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional

from pyquiet.kernels import thought_attention
from pyquiet.kernels.thought_attention import reference
from pyquiet.native import cpu

from .machine import Machine
from .thought_attention_cases import cases, measure, skip_above
from .thought_attention_problem import TOLERANCE, Shape
from .timing import best_seconds

# The dense masks grow with (T * P)^2: above this many scores a method is left out, about a second.
MAX_SCORES = 2**29

SHAPES = [*(Shape(t, p) for t in (128, 256, 512, 1024) for p in (1, 4, 8, 16)), Shape(256, 8, kv_heads=2)]
BFLOAT16_SHAPES = [Shape(128, 4), Shape(256, 8), Shape(512, 8), Shape(1024, 8, batch=1)]
# Compiling takes up to a minute each, so these shapes alone have compiled baselines.
COMPILED_METHODS = ("flex-32", "flex-16", "compiled blocked")
COMPILED = dict.fromkeys((Shape(128, 4), Shape(256, 8), Shape(512, 8), Shape(1024, 16)), COMPILED_METHODS)
BFLOAT16_COMPILED = {Shape(256, 8): COMPILED_METHODS}


@pytest.mark.parametrize(
    ("shape", "dtype", "method"),
    cases(SHAPES, torch.float32, COMPILED) + cases(BFLOAT16_SHAPES, torch.bfloat16, BFLOAT16_COMPILED),
)
def test_forward(benchmark: BenchmarkFixture, machine: Machine, shape: Shape, dtype: torch.dtype, method: str) -> None:
    skip_above(method, shape, MAX_SCORES)
    measure(benchmark, machine, shape, dtype, method, training=False, budget=1.2)


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
        return cpu.thought_attention(q, k, k, q, q, limits, None, 1.0, None, None, out, None, 1)

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
