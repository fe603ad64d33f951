"""The CPU kernels under ThreadSanitizer, and under AddressSanitizer and UBSan (sanitizers/).

OpenMP's runtime is replaced by one that the sanitizers see. The levels are avx2 and the best that this processor runs.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyquiet import native

ROOT = Path(__file__).parents[2]
SANITIZERS = Path(__file__).with_name("sanitizers")
GXX = shutil.which("g++")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fno-sanitize-recover=all"]
# Half the time of compilation: calls of the runtime, not inlined, and no checks for what AddressSanitizer sees anyway.
FLAGS += ["--param=asan-instrumentation-with-call-threshold=0", "-fno-sanitize=null,pointer-overflow"]
SUPPORTED = native.cpu.supported_isas() if native.cpu else []
LEVELS = [level for level in SUPPORTED if level in ("avx2", SUPPORTED[-1])]
LINKED = LEVELS + ["avx512_bf16"] * (LEVELS[-1:] == ["amx"])  # where amx sends floats
NARROW = [level for level in SUPPORTED if level in ("avx2", "avx512")] or SUPPORTED  # avx512 serves the higher ones
# Folder, levels to run, levels to link.
KERNELS = {
    "thought_attention": ("thought_attention", LEVELS, LINKED),
    "verify_draft": ("draft_verification", NARROW, NARROW),
    "draw_candidates": ("importance_resampling", NARROW, NARROW),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.cpu is None, reason="the native module tells what this processor runs"),
    pytest.mark.skipif(GXX is None or sys.platform != "linux", reason="needs g++ on Linux"),
]


def level_flags(level: str) -> list[str]:
    """As CMakeLists.txt has them."""
    words = dict(re.findall(r"set\(flags_(\w+) (.+)\)", (ROOT / "CMakeLists.txt").read_text()))
    text = words.get(level, "")
    while reference := re.search(r"\$\{flags_(\w+)\}", text):
        text = text.replace(reference[0], words[reference[1]])
    return text.split()


def runner(sanitizer: str, folder: Path) -> list[str]:
    """What to put before a command: memory laid out without chance, which ThreadSanitizer may need, where one may."""
    source, trial = folder / "trial.cpp", folder / "trial"
    source.write_text("int main() {}\n")
    done = subprocess.run([GXX, f"-fsanitize={sanitizer}", source, "-o", trial], capture_output=True, text=True)
    if done.returncode == 0:
        for prefix in (["setarch", "-R"], []):
            if prefix and shutil.which(prefix[0]) is None:
                continue
            done = subprocess.run([*prefix, trial], capture_output=True, text=True)
            if done.returncode == 0:
                return prefix
    pytest.skip(f"-fsanitize={sanitizer} does not work here: {done.stderr[-500:]}")


@pytest.fixture(scope="session", params=["thread", "address,undefined"], ids=["thread", "address"])
def sanitizer(request) -> str:
    return request.param


@pytest.fixture(scope="session", params=KERNELS)
def commands(request, sanitizer, tmp_path_factory) -> list[list]:
    """One command a level, for each kernel."""
    name, folder = request.param, tmp_path_factory.mktemp("sanitizers")
    source, run_levels, linked = KERNELS[name]
    prefix = runner(sanitizer, folder)
    compiler = [GXX, *FLAGS, f"-fsanitize={sanitizer}"]
    levels = " ".join(f"X({level})" for level in linked)
    sources = {
        "driver": [SANITIZERS / f"{name}.cpp", f"-DLEVELS={levels}"],
        "gomp": [SANITIZERS / "gomp.cpp"],
        "isa": [ROOT / "csrc/common/isa.cpp"],
    }
    for level in linked:
        kernel = [ROOT / f"csrc/{source}/cpu.cpp", f"-DPYQUIET_ISA={level}", *level_flags(level)]
        sources[level] = [*kernel, "-include", SANITIZERS / "accesses.hpp"]

    def build(name: str) -> Path:
        target = folder / f"{name}.o"
        run([*compiler, "-c", *sources[name], "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources))
    # Without -fopenmp: gomp.cpp has all that the pragmas call, or this fails.
    run([GXX, f"-fsanitize={sanitizer}", "-pthread", *objects, "-o", folder / name])
    return [[*prefix, folder / name, level] for level in run_levels]


def run(command: list) -> None:
    options = {"ASAN_OPTIONS": "", "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run(command, env=os.environ | options, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:8000] or f"exit status {done.returncode}"


def test_kernel(commands):
    for command in commands:
        run(command)
