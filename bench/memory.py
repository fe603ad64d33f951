"""How much memory a call takes: the peak of the process above what it held before, scratch of native code included."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_mib(run: Callable[[], Any]) -> float | None:
    """Return the most MiB that a call to `run` adds to the resident process, results included; None off Linux.

    Torch's own count of allocations would miss what native code allocates for itself.
    """
    if not RESET.exists():
        return None
    run()
    # Freed memory that malloc keeps is resident; without this the call would use it unseen.
    ctypes.CDLL(None).malloc_trim(0)
    RESET.write_text("5")  # the peak starts again from here
    before = resident_kib("VmRSS")
    run()
    return max(0, resident_kib("VmHWM") - before) / 1024


def resident_kib(field: str) -> int:
    """Return a field of the process's status that is given in kB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1])
