"""Draws of candidates on a CUDA device: the kernel against what a user would otherwise write.

Every method is captured in a CUDA graph, so what is timed is the device, not the launches; none waits for the host.
"""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .cuda import Gpu, median_seconds
from .draw_candidates_baselines import Drawn, Problem, cdf, check, multinomial, ours, race
from .thought_attention_cases import name_of

METHODS: dict[str, Callable[[Problem], Drawn]] = {
    "pyquiet": ours,
    "multinomial": multinomial,
    "race": race,
    "cdf": cdf,
    "compiled cdf": torch.compile(cdf, dynamic=False),
}
SHAPES = {
    torch.float32: [(64, 8, 151936), (256, 16, 50257)],
    torch.bfloat16: [(64, 8, 151936), (1024, 1, 50257), (1024, 16, 50257)],
}


def cases() -> list[object]:
    """Return every (shape, dtype, method), shape by shape, so that a shape's rows are timed together.

    Of one draw a row, torch.multinomial waits for the host, which a graph cannot.
    """
    return [
        pytest.param(shape, dtype, method, id=f"R{shape[0]}-k{shape[1]}-V{shape[2]}-{name_of(dtype)}-{method}")
        for dtype, shapes in SHAPES.items()
        for shape in shapes
        for method in METHODS
        if method != "multinomial" or shape[1] > 1
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype", "method"), cases())
def test_device(
    benchmark: BenchmarkFixture, gpu: Gpu, shape: tuple[int, int, int], dtype: torch.dtype, method: str
) -> None:
    if method == "pyquiet" and importlib.util.find_spec("pyquiet._cuda") is None:
        pytest.skip("pyquiet._cuda is not built: only the reference would be timed")
    given = Problem.make(*shape, dtype)
    torch.compiler.reset()
    METHODS[method](given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = METHODS[method](given)
    graph.replay()
    check(given, drawn, method)
    seconds = median_seconds(benchmark, graph.replay)
    gbs = given.logits.numel() * given.logits.itemsize / seconds * 1e-9  # the rows are read once
    benchmark.extra_info.update(
        table=f"draws of candidates on {gpu.name}, {name_of(dtype)}",
        shape=f"R{shape[0]}-k{shape[1]}-V{shape[2]}",
        method=method,
        seconds=seconds,
        moved_gbs=gbs,
        of_copy=gbs / gpu.copy_gbs,
    )
