"""`pyquiet doctor`: what this installation has, and what is missing."""

import argparse
from typing import Any

from pyquiet.cli.reports import add_json, check_json, show
from pyquiet.environment import SUPPORTED, examine


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "doctor",
        help="report what this installation has and what is missing",
        description="Report versions, native code, threads and GPU. Exit code 1 if the native module is missing.",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_json(args)
    report = examine()
    show(args, report, "\n".join(in_words(report)))
    return 0 if report["native"]["found"] else 1


def in_words(report: dict[str, Any]) -> list[str]:
    """The report for a reader, line by line."""
    lines = [f"pyquiet {report['pyquiet']}"]
    for name, entry in report["versions"].items():
        remark = ""
        if entry["status"] != "supported":
            remark = f": {entry['status']} (supported: {' to '.join(SUPPORTED[name])})"
        lines.append(_line(name, entry["version"] + remark))
    return [
        *lines,
        _line("machine", f"{report['processor']}, {report['platform']}"),
        _line("native code", _native_words(report["native"])),
        _line("threads", _thread_words(report["threads"])),
        _line("CUDA kernels", _cuda_words(report["cuda"])),
        _line("GPU", _gpu_words(report["cuda"])),
    ]


def _line(name: str, text: str) -> str:
    return f"  {name:<14}{text}"


def _native_words(native: dict[str, Any]) -> str:
    if not native["found"]:
        return (
            "MISSING: everything runs, but slowly, on torch alone. "
            "To build it, run `pip install -e .` in pyquiet's source folder."
        )
    choice = ", ".join(native["supported"])
    return f"found; uses {native['isa']} (this processor can run: {choice})"


def _thread_words(threads: dict[str, int]) -> str:
    words = f"torch {threads['torch']}, OpenMP {threads['openmp'] or 'not built in'}"
    if threads["openmp"] not in (0, threads["torch"]):
        words += " (two OpenMP runtimes are loaded and may compete for the processor)"
    return words


def _gpu_words(cuda: dict[str, Any]) -> str:
    if cuda["gpus"]:
        return f"torch sees {', '.join(cuda['gpus'])}"
    return f"torch sees none: {cuda['why_no_gpu']}"


def _cuda_words(cuda: dict[str, Any]) -> str:
    if not cuda["kernels_built"]:
        return (
            "not built: CUDA tensors take the slow torch references. "
            "To build them, put nvcc on PATH and run `pip install -e .` in pyquiet's source folder."
        )
    built = f"built for {', '.join(cuda['architectures'])} with CUDA {cuda['cuda']}"
    if cuda["why_unusable"]:
        return f"{built}; not usable here: {cuda['why_unusable']}"
    return f"{built}; usable (driver: CUDA {cuda['driver']})"
