"""The one place that loads the native modules.

`cpu` is `pyquiet._cpu`, `cuda()` is `pyquiet._cuda`; None where it was not built: then the torch references serve.
"""

import functools
import importlib
import os
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

# Before _cpu: both then share the OpenMP runtime that torch brings.
import torch  # noqa: F401

__all__ = ["cpu", "cuda", "isa"]


def _is_command() -> bool:
    """Whether this process is the command `pyquiet` or `python -m` of a module of ours, whose errors are a line."""
    name = sys.argv[0] if sys.argv else ""
    ours = any(word.removeprefix("-m").split(".")[0] == "pyquiet" for word in sys.orig_argv)
    return os.path.basename(name) == "pyquiet" or (name == "-m" and ours)


if TYPE_CHECKING:
    from pyquiet import _cpu as cpu
else:
    cpu: ModuleType | None
    try:
        import pyquiet._cpu as cpu
    except ModuleNotFoundError as error:
        if error.name != "pyquiet._cpu":
            raise
        cpu = None
        warnings.warn(
            "pyquiet's native module is not built, so the much slower torch references are used. "
            "To build it, run `pip install -e .` in pyquiet's source folder.",
            RuntimeWarning,
            stacklevel=2,
        )
    except ImportError as error:  # such as an unknown PYQUIET_ISA; the package has to load before its command can catch
        if not _is_command():
            raise
        print(f"pyquiet: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def isa() -> str | None:
    """The instruction-set level in use (sse4, avx2, avx512, ...); None without a native module."""
    return None if cpu is None else cpu.isa()


@functools.cache
def cuda() -> Any:
    """The CUDA module or None; loaded at the first call, which warns where there is none: ask only for CUDA tensors."""
    try:
        return importlib.import_module("pyquiet._cuda")
    except ModuleNotFoundError as error:
        if error.name != "pyquiet._cuda":
            raise
        warnings.warn(
            "pyquiet's CUDA kernels are not built, so CUDA tensors take the much slower torch references. "
            "To build them, put nvcc on PATH and run `pip install -e .` in pyquiet's source folder.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
