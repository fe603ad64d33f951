"""All that needs a CUDA device, in under ten minutes: `python -m bench.gpu [NAME]`.

Runs the tests marked `gpu`, compute-sanitizer's tools on tiny problems where it is on PATH, and the benches marked
`gpu`. Writes bench/results/NAME.json (the figures, by `--bench-record`) and bench/results/NAME-run.json (what each step
said). NAME is the device's own name unless given. Exits with 1 if a step failed.
"""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .report import save

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 570  # seconds, for all steps together
GRACE = 20  # seconds to stop in
TOOLS = ("memcheck", "racecheck", "synccheck")
PYTEST = (sys.executable, "-m", "pytest", "-m", "gpu", "-q")


def steps(name: str) -> dict[str, tuple[tuple[str, ...], float]]:
    """Return by name the commands to run and the most seconds that each may take."""
    sanitizer = shutil.which("compute-sanitizer")
    small = (sys.executable, "-m", "bench.gpu_small")
    checked = {
        tool: ((sanitizer, "--tool", tool, "--error-exitcode", "9", *small), 60.0) for tool in TOOLS if sanitizer
    }
    return {
        "tests": ((*PYTEST, "--benchmark-skip", "tests", "bench"), 150.0),
        **checked,
        "benches": ((*PYTEST, "bench", "--benchmark-only", "--benchmark-quiet", "--bench-record", name), BUDGET),
    }


def run_step(command: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """Return what became of a command: its exit code (None where its time ran out), seconds and last lines."""
    begin = time.perf_counter()
    step = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = step.communicate(timeout=seconds)
        code = step.returncode
    except subprocess.TimeoutExpired:
        step.send_signal(signal.SIGINT)  # pytest then still writes what it has measured
        code = None
        try:
            said, _ = step.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            step.kill()
            said, _ = step.communicate()
    return {
        "command": " ".join(command),
        "exit_code": code,
        "seconds": round(time.perf_counter() - begin, 1),
        "output": said.splitlines()[-60:],
    }


def main() -> int:
    """Run every step, whatever became of those before it."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was run", file=sys.stderr)
        return 1
    name = sys.argv[1] if len(sys.argv) > 1 else re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    end, found = time.perf_counter() + BUDGET, {}
    for step, (command, most) in steps(name).items():
        left = end - time.perf_counter()
        found[step] = (
            run_step(command, min(most, left)) if left > 1 else {"command": " ".join(command), "exit_code": None}
        )
        print(f"== {step}: exit code {found[step]['exit_code']}", *found[step].get("output", []), sep="\n", flush=True)
        save(ROOT / "bench" / "results" / f"{name}-run.json", found)
    if not shutil.which("compute-sanitizer"):
        print("compute-sanitizer is not on PATH: its checks were not run")
    return int(any(step["exit_code"] != 0 for step in found.values()))


if __name__ == "__main__":
    sys.exit(main())
