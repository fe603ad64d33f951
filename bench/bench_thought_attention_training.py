"""Thought attention, forward and backward: the kernel against the forms of plain torch that can train.

What is timed is the output and `torch.autograd.grad` with respect to all five inputs, for one given gradient of the
output. Every gradient is checked against float64 before that.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .machine import Machine
from .thought_attention_cases import cases, measure, skip_above
from .thought_attention_problem import Shape

# A call above this takes more than a second.
MAX_SCORES = 2**27

ONE_TEXT = Shape(1024, 8, batch=1)
SHAPES = [
    *(Shape(t, p) for t in (128, 256, 512, 1024) for p in (4, 8)),
    Shape(256, 1),
    Shape(256, 16),
    Shape(1024, 16),
    Shape(256, 8, kv_heads=2),
    ONE_TEXT,
]
BFLOAT16_SHAPES = [Shape(128, 4), Shape(256, 8), Shape(512, 8), ONE_TEXT]
# Compiling forward and backward takes one to two minutes where torch has nothing in its cache.
COMPILED = dict.fromkeys((Shape(128, 4), Shape(256, 8), Shape(512, 8)), ("compiled blocked",))
BFLOAT16_COMPILED = {Shape(256, 8): ("compiled blocked",)}


@pytest.mark.parametrize(
    ("shape", "dtype", "method"),
    cases(SHAPES, torch.float32, COMPILED) + cases(BFLOAT16_SHAPES, torch.bfloat16, BFLOAT16_COMPILED),
)
def test_forward_and_backward(
    benchmark: BenchmarkFixture, machine: Machine, shape: Shape, dtype: torch.dtype, method: str
) -> None:
    skip_above(method, shape, MAX_SCORES)
    measure(benchmark, machine, shape, dtype, method, training=True, budget=0.8)
