"""What a figure was measured on: ISA, processor, threads, versions, ceilings of this run."""

import functools
import platform
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

import pyquiet.native
from pyquiet.environment import processor_name

# g++ flags and register bytes of each ISA that pyquiet's CPU code is compiled for.
ISA_FLAGS: dict[str, tuple[list[str], int]] = {
    "sse4": (["-march=x86-64-v2"], 16),
    "avx2": (["-march=x86-64-v3"], 32),
    "avx512": (["-march=x86-64-v4"], 64),
    "avx512_bf16": (["-march=x86-64-v4", "-mavx512bf16"], 64),
    "amx": (["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"], 64),
    "neon": ([], 16),
}
# Far above any cache share of two cores, yet read in a fraction of a second.
READ_MEGABYTES = 512


@dataclass(frozen=True)
class Machine:
    """The machine record. `fma_gflops` and `read_gbs` are None where `ceilings` says why.

    `bf16_gflops` is the peak of AMX tiles, else of vdpbf16ps; None too where the ISA has neither.
    """

    isa: str
    cpu: str
    threads: int
    python: str
    torch: str
    transformers: str
    fma_gflops: float | None
    bf16_gflops: float | None
    read_gbs: float | None
    ceilings: str

    def sentence(self) -> str:
        """Return the record in one line of words."""
        where = f"{self.isa}, {self.threads} threads, {self.cpu}, torch {self.torch}"
        if self.fma_gflops is None:
            return f"{where}; peak unknown: {self.ceilings}"
        bf16 = f", {self.bf16_gflops:.0f} bf16" if self.bf16_gflops else ""
        return f"{where}; peak {self.fma_gflops:.0f} GFLOP/s fp32{bf16}, read {self.read_gbs:.0f} GB/s"


def measure_ceilings(isa: str | None, threads: int) -> tuple[dict[str, float | None], str]:
    """Return the ceilings by their field's name, and how they were measured, or why they were not."""
    unknown: dict[str, float | None] = dict.fromkeys(("fma_gflops", "read_gbs", "bf16_gflops"))
    compiler = shutil.which("g++")
    if compiler is None:
        return unknown, "no g++ to compile fma_peak.cpp"
    if isa is None:
        return unknown, "no native module, so no ISA to measure"
    if isa not in ISA_FLAGS:
        return unknown, f"no compiler flags known for ISA {isa!r}"
    flags, vector_bytes = ISA_FLAGS[isa]
    flags = ["-O3", "-fopenmp", *flags, f"-DVECTOR_BYTES={vector_bytes}", "-Wno-psabi"]
    source = Path(__file__).with_name("fma_peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "fma_peak")
        compiled = subprocess.run([compiler, *flags, str(source), "-o", program], capture_output=True, text=True)
        if compiled.returncode:
            return unknown, f"g++ could not compile fma_peak.cpp: {compiled.stderr[:200]}"
        command = [program, str(threads), str(READ_MEGABYTES)]
        measured = subprocess.run(command, capture_output=True, text=True, check=True)
    # The last figure is missing where the ISA has no bf16 instruction.
    return unknown | dict(zip(unknown, map(float, measured.stdout.split()), strict=False)), (
        f"fma_peak.cpp, g++ {' '.join(flags)}"
    )


@functools.cache
def this_machine() -> Machine:
    """Return the record of this machine; the ceilings are measured once a run."""
    isa, threads = pyquiet.native.isa(), torch.get_num_threads()
    ceilings, how = measure_ceilings(isa, threads)
    return Machine(
        isa=isa or "no native module",
        cpu=processor_name(),
        threads=threads,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        ceilings=how,
        **ceilings,
    )


def as_record() -> dict[str, object]:
    """Return the machine record as plain data for JSON."""
    return asdict(this_machine())
