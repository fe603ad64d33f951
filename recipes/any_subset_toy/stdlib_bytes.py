"""Python's standard library as windows of bytes, one file in twenty held out."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

LENGTH = 96
_LEFT_OUT = {"site-packages", "test", "tests", "idle_test"}


def windows() -> tuple[Tensor, Tensor]:
    """Bytes to train on and held-out ones, int64 [W, LENGTH]."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in sorted(root.rglob("*.py")) if not _LEFT_OUT & set(file.relative_to(root).parts)]
    train = b"".join(file.read_bytes() for number, file in enumerate(files) if number % 20)
    held_out = b"".join(file.read_bytes() for file in files[::20])
    return _cut(train), _cut(held_out)


def _cut(text: bytes) -> Tensor:
    whole = len(text) // LENGTH * LENGTH
    return torch.frombuffer(bytearray(text[:whole]), dtype=torch.uint8).long().view(-1, LENGTH)
