"""Slots over the time of a run: who held which, how busy they were, and what barriers kept idle."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyquiet.scaling.records import Key, Record
from pyquiet.scaling.table import Rows

Floats = NDArray[np.float64]
POOLS = ("draft", "score", "target")


class Held(NamedTuple):
    """A slot of a pool from `start` to `end`, in seconds since the run began; the last try of a request."""

    slot: int
    start: float
    end: float
    key: Key


def slots(records: Iterable[Record]) -> dict[str, list[Held]]:
    """For each pool when its slots were held, in the order of their starts."""
    held: dict[str, list[Held]] = {pool: [] for pool in POOLS}
    for record in records:
        if record.timing is not None and record.stage in held:
            held[record.stage].append(Held(record.timing.slot, record.timing.started, record.timing.ended, record.key))
    return {pool: sorted(rows, key=lambda row: row.start) for pool, rows in held.items()}


def service_seconds(rows: Rows) -> float:
    """Seconds that slots were held, over all of them."""
    timed = rows.timed
    return float((timed["ended"] - timed["started"]).sum())


def barrier_seconds(rows: Rows, sizes: Mapping[str, int]) -> float:
    """T_s of a run in step: seconds that slots of all pools were idle, over all of them, while a chain that was done
    with a stage waited for another chain of its question to be done with it."""
    held = rows.timed
    if not len(held):
        return 0.0
    start, end = held["started"], held["ended"]
    first, last = extremes(held.groups("phase", "question", "turn", "stage", "attempt"), end, end)
    times = np.unique([start, end])
    idle = np.maximum(sum(sizes.values()) - _covered(times, start, end), 0)
    blocked = _covered(times, first, last) > 0
    return float((np.diff(times) * idle[:-1] * blocked[:-1]).sum())


def peak_tokens(rows: Rows) -> int:
    """The most tokens that requests held at the same time, what they wrote counted from their start."""
    held = rows.timed
    tokens = held["prompt_tokens"].astype(np.int64) + held["completion_tokens"]
    times, changes = np.concatenate([held["started"], held["ended"]]), np.concatenate([tokens, -tokens])
    return int(changes[np.lexsort((changes, times))].cumsum().max(initial=0))


def extremes(groups: NDArray[np.int64], low: Floats, high: Floats) -> tuple[Floats, Floats]:
    """The least of `low` and the greatest of `high` in each group, infinite in one without rows."""
    count = int(groups.max(initial=-1)) + 1
    least, most = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(least, groups, low)
    np.maximum.at(most, groups, high)
    return least, most


def _covered(times: Floats, begins: Floats, ends: Floats) -> NDArray[np.int64]:
    """How many spans, whose ends are among the times, cover the time from each to the next."""
    size = len(times)
    opened, closed = (np.bincount(np.searchsorted(times, side), minlength=size) for side in (begins, ends))
    return np.asarray((opened - closed).cumsum())
