"""How a run is held: its journal, Ctrl-C, and event loops that run already."""

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from pyquiet.scaling.journal import Journal
from pyquiet.scaling.records import Record
from pyquiet.scaling.session import Session

T = TypeVar("T")


@contextmanager
def journalled(
    path: str | os.PathLike[str] | None, header: Mapping[str, Any]
) -> Iterator[tuple[Journal | None, list[Record]]]:
    """The journal, begun or gone on with, and the records that are in it."""
    if path is None:
        yield None, []
        return
    journal = Journal.open(path, header) if os.path.exists(path) else Journal.create(path, header)
    with journal:
        yield journal, list(journal.records)


@contextmanager
def interruptible(session: Session, grace: float) -> Iterator[None]:
    """Ctrl-C asks the session to stop, and breaks it off after `grace` seconds or when pressed again.

    What is broken off ends here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    breaking_off: list[asyncio.TimerHandle] = []
    breaks = 0

    def break_off() -> None:
        nonlocal breaks
        breaks += task.cancel()

    def stop() -> None:
        if session.stopping:
            break_off()
        session.stopping = True
        breaking_off.append(loop.call_later(grace, break_off))

    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        yield
    except asyncio.CancelledError:
        if task.cancelling() > breaks:  # somebody else's
            raise
        for _ in range(breaks):
            task.uncancel()
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        for timer in breaking_off:  # else a caller whose loop goes on would be cancelled later
            timer.cancel()


def blocking(work: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end, in a thread of its own where an event loop runs already (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
