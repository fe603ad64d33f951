"""Programs that run in several processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def in_processes(count: int, module: str, *words: str | Path) -> None:
    """Runs a module of the tests as a program with these words in several processes; they must all succeed."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", f"tests.{module}", *map(str, words)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
