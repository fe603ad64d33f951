"""The processes of a run, as torchrun and `accelerate launch` start them."""

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

# How long one may wait for the others. They end when one of them fails, so this only has to be longer than any run.
_PATIENCE = timedelta(days=365)


@dataclass(frozen=True)
class Ranks:
    """This process's number among `size`, and its number on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0

    @classmethod
    def current(cls) -> "Ranks":
        """What the environment says; one process alone where it says nothing."""
        return cls(
            *(int(os.environ.get(name, "") or n) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        )

    def device(self, name: str) -> str:
        """The device of that name; of several processes on a machine each has a "cuda" of its own."""
        return f"cuda:{self.local}" if name == "cuda" and self.size > 1 else name

    def join(self) -> None:
        """Opens a group of all processes, unless there is one; it ends with the process, for there is no second one."""
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_PATIENCE)
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())

    def wait(self) -> None:
        """Returns when all have called it."""
        if self.size > 1:
            dist.barrier()

    def everyones(self, value: Any) -> list[Any]:
        """The value of every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values
