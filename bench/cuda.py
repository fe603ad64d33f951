"""How every figure on a CUDA device is taken, and the ceilings of the device."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

# Writing this much empties the L2 of every device, and lasts long enough for the host to queue a whole call behind it:
# what is timed is the device, not the launches.
FLUSH_BYTES = 2**32
ROUNDS = 30
FEWEST_ROUNDS = 5
CEILING_ROUNDS = 20
COPY_BYTES = 2**30
MATMUL_SIZE = 8192


@dataclass(frozen=True)
class Gpu:
    """The device record. `matmul_tflops` is by dtype; float32 without TF32."""

    name: str
    capability: str
    multiprocessors: int
    memory_gib: float
    cuda: str
    copy_gbs: float  # bytes read and written
    matmul_tflops: dict[str, float]

    def sentence(self) -> str:
        """Return the record in one line of words."""
        rates = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in self.matmul_tflops.items())
        return f"{self.name}, sm_{self.capability}, CUDA {self.cuda}; copy {self.copy_gbs:.0f} GB/s, TFLOP/s {rates}"


@functools.cache
def this_gpu() -> Gpu:
    """Return the record of the current device; its ceilings are measured once a run."""
    facts = torch.cuda.get_device_properties(0)
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = statistics.median(seconds_of(lambda: target.copy_(source), CEILING_ROUNDS))
    return Gpu(
        name=facts.name,
        capability=f"{facts.major}{facts.minor}",
        multiprocessors=facts.multi_processor_count,
        memory_gib=facts.total_memory / 2**30,
        cuda=torch.version.cuda or "unknown",
        copy_gbs=2 * COPY_BYTES / copy * 1e-9,
        matmul_tflops={str(x).removeprefix("torch."): matmul_tflops(x) for x in (torch.bfloat16, torch.float32)},
    )


def as_record() -> dict[str, object] | None:
    """Return the device record as plain data for JSON; None without a device."""
    return asdict(this_gpu()) if torch.cuda.is_available() else None


def matmul_tflops(dtype: torch.dtype) -> float:
    """Return the rate of one large square product."""
    # Zeros would draw less power than real numbers, and so run at a higher clock.
    left, right = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda").to(dtype) for _ in range(2))
    seconds = statistics.median(seconds_of(lambda: left @ right, CEILING_ROUNDS))
    return 2 * MATMUL_SIZE**3 / seconds * 1e-12


def median_seconds(benchmark: BenchmarkFixture, run: Callable[[], Any], budget: float = 0.5) -> float:
    """Return the median of the seconds that the device takes for a call to `run`, its L2 emptied before each."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    rounds = int(min(ROUNDS, max(FEWEST_ROUNDS, budget / (time.perf_counter() - begin))))
    seconds: list[float] = []
    # One round of pytest-benchmark holds all of ours: it would put the host's clock around each.
    benchmark.pedantic(lambda: seconds.extend(seconds_of(run, rounds)), rounds=1)
    return statistics.median(seconds)


def seconds_of(run: Callable[[], Any], rounds: int) -> list[float]:
    """Return the device's seconds for each of `rounds` calls, by events on its stream."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    events = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        run()
        end.record()
        events.append((begin, end))
        torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in events]


def peak_mib(run: Callable[[], Any]) -> float:
    """Return the most MiB that a call to `run` allocates through torch, results included."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
