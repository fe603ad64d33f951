"""The machine record of a bench run, its printed tables, and `--bench-record NAME`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import get_commit_info

from . import cuda, report
from .machine import Machine, as_record, this_machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-record",
        metavar="NAME",
        help="write the figures and the machine record to bench/results/NAME.json",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def machine() -> Machine:
    """The machine record; the ceilings are measured before the first bench that asks."""
    return this_machine()


@pytest.fixture(scope="session")
def gpu() -> cuda.Gpu:
    """The record of the CUDA device; its ceilings are measured before the first bench that asks."""
    return cuda.this_gpu()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for a test; the others get theirs back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["pyquiet"] = as_record()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    rows = [bench.extra_info for bench in benches(config) if "table" in bench.extra_info]
    if not rows:
        return
    terminalreporter.section("pyquiet benches")
    terminalreporter.write_line(this_machine().sentence())
    if torch.cuda.is_available():
        terminalreporter.write_line(cuda.this_gpu().sentence())
    terminalreporter.write_line(report.disturbance(rows))
    for line in report.lines(rows):
        terminalreporter.write_line(line)
    name = config.getoption("--bench-record")
    if name:
        path = Path(__file__).parent / "results" / f"{name}.json"
        report.save(path, {"machine": as_record(), "gpu": cuda.as_record(), "commit": commit(), "rows": rows})
        terminalreporter.write_line(f"\nwritten: {path}")


def benches(config: pytest.Config) -> list[Any]:
    """Return what pytest-benchmark measured in this run; nothing where it is switched off."""
    session = getattr(config, "_benchmarksession", None)
    return list(session.benchmarks) if session else []


def commit() -> dict[str, Any]:
    """Return the commit that was measured, and whether the tree held uncommitted changes."""
    info = get_commit_info()
    return {key: info.get(key) for key in ("id", "dirty", "time")}
