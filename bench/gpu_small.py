"""The CUDA kernels on tiny problems, for compute-sanitizer: `compute-sanitizer python -m bench.gpu_small`.

Inputs are made, and results compared, on the CPU, so that hardly another kernel runs.
"""

import torch

from . import draw_candidates_baselines as candidates
from .bench_verify_draft_gpu import METHODS, Problem, check
from .thought_attention_baselines import eager_results, kernel
from .thought_attention_problem import Shape, make_problem, training_of

SHAPES = [Shape(5, 3, batch=1, heads=2, kv_heads=1, head_size=24), Shape(37, 4, batch=2, heads=2, kv_heads=2)]


def main(device: str = "cuda") -> None:
    """Raise if a result of the device is further from float64 than the benches allow."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in SHAPES:
            problem = make_problem(shape, dtype, training=True, eager=eager_results)
            inputs = problem.inputs.to(device)
            run, unpack = training_of(kernel, inputs, problem.d_out.to(device))
            problem.error([x.cpu() for x in unpack(run())])
            print(f"{shape.name} {dtype}: right")
        given = Problem.make(8, 3, 5003, dtype, "cpu")
        for method in ("pyquiet", "pyquiet draft_lse"):
            check(given, METHODS[method](given.to(device)), method)
        print(f"draft verification {dtype}: right")
        rows = candidates.Problem.make(8, 5, 5003, dtype, "cpu")
        candidates.check(rows, candidates.ours(rows.to(device)), "pyquiet")
        print(f"candidates {dtype}: right")


if __name__ == "__main__":
    main()
