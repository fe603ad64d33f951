"""What an installation is made of and where it runs; and the record of it that goes with every report."""

import hashlib
import platform
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn

SUPPORTED = {
    "Python": ("3.11", "3.13"),
    "torch": ("2.11", "2.15"),
    "transformers": ("5.17", "5.24"),
}


def environment_record(
    command: str, arguments: Mapping[str, Any], models: Mapping[str, nn.Module | None] | None = None
) -> dict[str, Any]:
    """What a report came from, as JSON values: `examine`, the time (UTC), the command, and `describe` of its models.

    A model that is None is left out.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "arguments": dict(arguments),
        "models": {name: describe(model) for name, model in (models or {}).items() if model is not None},
        **examine(),
    }


def describe(model: nn.Module) -> dict[str, Any]:
    """A model's class, size, dtype and device, and its `fingerprint`."""
    tensors = list(model.state_dict().values())
    return {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(tensors[0].dtype).removeprefix("torch."),
        "device": str(tensors[0].device),
        "fingerprint": fingerprint(model),
    }


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, dtypes, shapes and bits of all weights, which are read once; not of the configuration."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(bits(tensor))
    return digest.hexdigest()


def bits(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor's elements in their order, whatever device and layout it has; to be hashed."""
    data: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return data


def examine() -> dict[str, Any]:
    """The report, made of JSON values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a module is missing stands in the report
        from pyquiet import __version__, native

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
        "platform": platform.platform(),
        "processor": processor_name(),
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


def processor_name() -> str:
    """The processor's own name, or the platform's word where it has none."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


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


def _gpus() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _why_no_gpu() -> str | None:
    if torch.cuda.is_available():
        return None
    try:
        torch.empty(1, device="cuda")
    except (AssertionError, RuntimeError) as error:  # without CUDA it is an AssertionError
        return str(error).split("\n")[0]
    return "the driver reports no device"
