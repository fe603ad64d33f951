"""`pyquiet doctor`: what this installation has, and what is missing."""

import argparse
import json
import platform
import warnings
from types import ModuleType
from typing import Any

from pyquiet import __version__

SUPPORTED = {
    "Python": ("3.11", "3.13"),
    "torch": ("2.11", "2.15"),
    "transformers": ("5.17", "5.24"),
}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "doctor",
        help="report what this installation has and what is missing",
        description="Report versions, native code, threads and GPU. Exit code 1 if the native module is missing.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    report = examine()
    print(json.dumps(report, indent=2) if args.json else "\n".join(in_words(report)))
    return 0 if report["native"]["found"] else 1


def examine() -> dict[str, Any]:
    """The report, made of JSON values."""
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a module is missing stands in the report
        from pyquiet import native

        cpu, cuda = native.cpu, native.cuda()
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {
        "pyquiet": __version__,
        "versions": {
            name: {"version": version, "status": version_status(version, *SUPPORTED[name])}
            for name, version in versions.items()
        },
        "native": {
            "found": cpu is not None,
            "isa": native.isa(),
            "built": cpu.compiled_isas() if cpu else [],
            "supported": cpu.supported_isas() if cpu else [],
        },
        "threads": {
            "torch": torch.get_num_threads(),
            "openmp": cpu.openmp_threads() if cpu else 0,
        },
        "cuda": _cuda_report(cuda) | {"gpus": _gpus(), "why_no_gpu": _why_no_gpu()},
    }


def version_status(version: str, oldest: str, newest: str) -> str:
    """Where a version stands: "supported", "too old" or "newer than tested"."""
    here, low, high = ([int(part) for part in v.split(".")[:2]] for v in (version, oldest, newest))
    if here < low:
        return "too old"
    return "newer than tested" if here > high else "supported"


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


def _cuda_report(cuda: ModuleType | None) -> dict[str, Any]:
    if cuda is None:
        return {"kernels_built": False, "architectures": [], "cuda": None, "driver": None, "why_unusable": "not built"}
    driver = cuda.driver_version()
    return {
        "kernels_built": True,
        "architectures": cuda.architectures(),
        "cuda": _cuda_version(cuda.runtime_version()),
        "driver": _cuda_version(driver) if driver else None,
        "why_unusable": _why_unusable(cuda),
    }


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _why_unusable(cuda: ModuleType) -> str | None:
    try:
        gpus = cuda.gpus()
    except RuntimeError as error:
        return str(error) if cuda.driver_version() else f"there is no NVIDIA driver ({error})"
    misfits = [
        f"{name} (sm_{major}{minor})"
        for name, (major, minor) in gpus
        if not runs_on(cuda.architectures(), major, minor)
    ]
    return f"no code for {', '.join(misfits)}" if misfits else None


def runs_on(architectures: list[str], major: int, minor: int) -> bool:
    """Whether code for one of these (sm_80: machine code, compute_100: PTX) runs on a GPU of that capability."""
    for architecture in architectures:
        kind, number = architecture.split("_")
        digits = number.rstrip("af")
        built = int(digits[:-1]), int(digits[-1])
        if built == (major, minor):
            return True
        if number == digits and built < (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return False


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


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _why_no_gpu() -> str | None:
    import torch

    if torch.cuda.is_available():
        return None
    try:
        torch.empty(1, device="cuda")
    except (AssertionError, RuntimeError) as error:  # without CUDA it is an AssertionError
        return str(error).split("\n")[0]
    return "the driver reports no device"
