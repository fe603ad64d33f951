"""Programs that run a CUDA kernel's source on the CPU (shim.hpp): their build, and the files they read and write."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-DPYQUIET_CUDA_SHIM"]
FLAGS += ["-fno-strict-aliasing", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def built(name: str, folder: Path) -> Path:
    """The program of NAME.cpp, under AddressSanitizer and UBSan; skips the test where it cannot be built."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    if os.uname().machine != "x86_64":
        pytest.skip("the shim's fibers are written for x86-64")
    source = Path(__file__).with_name(f"{name}.cpp")
    subprocess.run([compiler, *FLAGS, f"-I{source.parent}", str(source), "-o", str(folder / name)], check=True)
    return folder / name


def storage_of(x: Tensor) -> Tensor:
    """All elements behind a view."""
    return x.new_empty(0).set_(x.untyped_storage())


def among_nan(x: Tensor) -> Tensor:
    """The rows of x in a storage of NaN, where every row begins elsewhere; what has no rows of floats as it is."""
    if not x.is_floating_point() or x.ndim < 2 or 0 in x.stride() or not x.numel():
        return x
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 1), torch.nan)
    return wide[..., 1:].copy_(x)


def name_of(case: Mapping[str, object]) -> str:
    """The options of a case in words, for the name of its test."""
    return "-".join(f"{name}={'...' if isinstance(x, Tensor) else x}" for name, x in case.items()) or "plain"


def run_program(program: Path, given: Mapping[str, Tensor], written: Collection[str]) -> dict[str, Tensor]:
    """The storages of the tensors called `written` after the program has run on those that are given."""
    problem, result = program.with_suffix(".problem"), program.with_suffix(".result")
    with problem.open("wb") as f:
        f.write(struct.pack("<q", len(given)))
        for name, x in given.items():
            storage = storage_of(x).view(torch.uint8).numpy().tobytes()
            f.write(struct.pack("<q", len(name)) + name.encode())
            f.write(struct.pack(f"<q{2 * x.ndim}q", x.ndim, *x.shape, *x.stride()))
            f.write(struct.pack("<qq", x.storage_offset(), len(storage)) + storage)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    done = subprocess.run([program, problem, result], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    data, outputs = bytearray(result.read_bytes()), {}
    for name in sorted(written):
        storage = storage_of(given[name])
        size = storage.numel() * storage.element_size()
        outputs[name] = torch.frombuffer(data[:size], dtype=storage.dtype) if size else storage
        data = data[size:]
    assert not data
    return outputs
