"""How much memory a call takes: the peak of the process above what it held before, scratch of native code included."""

import ctypes
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

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


class Saved:
    """A tensor that autograd keeps; gone when the node of the graph that it is kept for is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # the result of a node would keep the node alive that keeps it


def saved_mib(forward: Callable[[], Any], weights: Iterable[Tensor]) -> float:
    """Return the MiB that `forward` leaves saved for the backward pass of its result, each storage once, no weights.

    What activation checkpointing keeps, the inputs of what it recomputes, is counted too.
    """
    saved: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        saved.add(kept := Saved(tensor))
        return kept

    with saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = forward()
    storages = [kept.tensor.untyped_storage() for kept in saved]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for weight in weights:
        sizes.pop(weight.untyped_storage().data_ptr(), None)
    del result
    return sum(sizes.values()) / 2**20
