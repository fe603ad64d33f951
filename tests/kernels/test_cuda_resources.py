"""What the compiler says of the CUDA kernels: none may keep registers in memory."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {
    "thought_attention": ["forward_kernel", "prepare_kernel", "query_gradient_kernel", "key_gradient_kernel"],
    "draft_verification": ["reduce_kernel", "exact_kernel", "draw_kernel"],
    "importance_resampling": ["threshold_kernel", "sum_kernel", "lookup_kernel"],
}
# Of thought attention, one of the architectures that are built for; each takes half a minute.
OFTEN = [(folder, arch) for folder in ("draft_verification", "importance_resampling") for arch in ("80", "90a", "100")]
BUILDS = [("thought_attention", "90a"), *OFTEN]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize(("folder", "arch"), BUILDS)
def test_no_kernel_spills(folder, arch, tmp_path):
    command = [NVCC, "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v,-warn-spills"]
    command += ["-c", ROOT / "csrc" / folder / "cuda.cu", "-o", tmp_path / "cuda.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pattern = (
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    report = re.findall(pattern, done.stderr)
    for kernel in KERNELS[folder]:
        assert sum(kernel in name for name, *_ in report) >= 3, f"{kernel} is not compiled for every element type"
    # No stack frame either: one without spills is an array that is indexed at run time.
    assert [row for row in report if row[1:] != ("0", "0", "0")] == []
    assert "warning" not in done.stderr
