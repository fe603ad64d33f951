"""The baselines compute what the reference computes: output and all five gradients."""

import pytest
import torch

from . import thought_attention_baselines as baselines
from .thought_attention_problem import Shape, forward_of, leeway, make_problem, training_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [Shape(64, 4, heads=2, kv_heads=2, head_size=16), Shape(128, 3, heads=4, kv_heads=2, head_size=32)]
EAGER = [name for name in baselines.METHODS if not name.startswith(("compiled", "flex"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("method", EAGER)
def test_output_and_gradients(method: str, shape: Shape, dtype: torch.dtype, device: str) -> None:
    if method == "decomposition" and device == "cuda" and dtype is torch.float32:
        pytest.skip("torch has no float32 flash attention on CUDA")
    problem = make_problem(shape, dtype, training=True, eager=baselines.eager_results, device=device)
    form = baselines.METHODS[method]
    with torch.no_grad():
        run, unpack = forward_of(form, problem.inputs)
        problem.error(unpack(run()), leeway(method, dtype))
    run, unpack = training_of(form, problem.inputs, problem.d_out)
    problem.error(unpack(run()), leeway(method, dtype))
