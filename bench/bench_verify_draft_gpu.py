"""Verification of drafts on a CUDA device: the kernel against what a user would otherwise write.

Every method is captured in a CUDA graph, so what is timed is the device, not the launches; none waits for the host.
"""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from .cuda import Gpu, median_seconds
from .thought_attention_cases import name_of
from .verify_draft_baselines import Problem, cdf, check, ours, race

METHODS: dict[str, Callable[[Problem], Tensor]] = {
    "pyquiet": ours,
    "pyquiet draft_lse": lambda given: ours(given, given.lse),
    "race": race,
    "cdf": cdf,
    "compiled cdf": torch.compile(cdf, dynamic=False),
}
SHAPES = {
    torch.float32: [(1, 5, 32000), (1, 5, 151936), (8, 7, 50257)],
    torch.bfloat16: [(1, 5, 151936), (8, 7, 50257), (64, 8, 128256)],
}


def cases() -> list[object]:
    """Return every (shape, dtype, method), shape by shape, so that a shape's rows are timed together."""
    return [
        pytest.param(shape, dtype, method, id=f"B{shape[0]}-k{shape[1]}-V{shape[2]}-{name_of(dtype)}-{method}")
        for dtype, shapes in SHAPES.items()
        for shape in shapes
        for method in METHODS
    ]


def least_bytes(given: Problem, method: str) -> int:
    """Return the bytes of the rows that must be read once: with the draft's log-sum-exps, its rejected ones alone."""
    (B, k, V), size = given.draft.shape, given.draft.itemsize
    return B * V * size * (k + 2 if method == "pyquiet draft_lse" else 2 * k + 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype", "method"), cases())
def test_device(
    benchmark: BenchmarkFixture, gpu: Gpu, shape: tuple[int, int, int], dtype: torch.dtype, method: str
) -> None:
    if method.startswith("pyquiet") and importlib.util.find_spec("pyquiet._cuda") is None:
        pytest.skip("pyquiet._cuda is not built: only the reference would be timed")
    given = Problem.make(*shape, dtype)
    torch.compiler.reset()
    METHODS[method](given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = METHODS[method](given)
    graph.replay()
    check(given, tokens, method)
    seconds = median_seconds(benchmark, graph.replay)
    gbs = least_bytes(given, method) / seconds * 1e-9
    benchmark.extra_info.update(
        table=f"draft verification on {gpu.name}, {name_of(dtype)}",
        shape=f"B{shape[0]}-k{shape[1]}-V{shape[2]}",
        method=method,
        seconds=seconds,
        moved_gbs=gbs,
        of_copy=gbs / gpu.copy_gbs,
    )
