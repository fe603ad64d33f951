"""Models of one process that take turns on their device."""

from collections import deque
from functools import cache
from threading import Lock
from types import TracebackType

import torch


class Turns:
    """A lock that is had in the order in which it was asked for.

    Forwards of two models at once would only take the interpreter and the device from each other, operation by
    operation; a plain lock would be had again by who has just given it back.
    """

    def __init__(self) -> None:
        self._guard, self._busy = Lock(), False
        self._waiting: deque[Lock] = deque()

    def __enter__(self) -> None:
        with self._guard:
            if not self._busy:
                self._busy = True
                return
            mine = Lock()
            mine.acquire()
            self._waiting.append(mine)
        mine.acquire()  # until the one before hands on

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._busy = False


@cache
def turns_on(device: torch.device) -> Turns:
    """The turns of all models on a device."""
    return Turns()
