"""Slots over the time of a run: who held which, how busy they were, and what barriers kept idle."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pyquiet.scaling.records import Key, Record

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
        if record.timing is not None and record.key.stage in held:
            held[record.key.stage].append(
                Held(record.timing.slot, record.timing.started, record.timing.ended, record.key)
            )
    return {pool: sorted(rows, key=lambda row: row.start) for pool, rows in held.items()}


def service_seconds(held: Sequence[Held]) -> float:
    """Seconds that slots were held, over all of them."""
    return sum(row.end - row.start for row in held)


def barrier_seconds(held: Mapping[str, Sequence[Held]], sizes: Mapping[str, int]) -> float:
    """T_s of a run in step: seconds that slots of all pools were idle, over all of them, while a chain that was done
    with a stage waited for another chain of its question to be done with it."""
    groups: dict[tuple[str, str, int, str, int], list[float]] = defaultdict(list)
    rows = [row for pool in POOLS for row in held[pool]]
    for row in rows:
        key = row.key
        groups[key.phase, key.question, key.turn, key.stage, key.attempt].append(row.end)
    windows = [(min(ends), max(ends)) for ends in groups.values()]
    if not rows:
        return 0.0
    times = np.unique([time for row in rows for time in (row.start, row.end)])
    busy = _covered(times, [(row.start, row.end) for row in rows])
    blocked = _covered(times, windows) > 0
    idle = np.maximum(sum(sizes.values()) - busy, 0)
    return float((np.diff(times) * idle[:-1] * blocked[:-1]).sum())


def peak_tokens(records: Iterable[Record], stage: str) -> int:
    """The most tokens that requests of a stage held at the same time, what they wrote counted from their start."""
    changes = []
    for record in records:
        if record.key.stage == stage and record.timing is not None:
            tokens = record.usage.prompt_tokens + record.usage.completion_tokens
            changes += [(record.timing.started, tokens), (record.timing.ended, -tokens)]
    return max(np.cumsum([tokens for _, tokens in sorted(changes)]).tolist(), default=0)


def _covered(times: Floats, spans: Sequence[tuple[float, float]]) -> NDArray[np.int64]:
    """How many of the spans, whose ends are among the times, cover the time from each to the next."""
    change = np.zeros(len(times), dtype=np.int64)
    begins, ends = np.array(spans).T
    np.add.at(change, np.searchsorted(times, begins), 1)
    np.add.at(change, np.searchsorted(times, ends), -1)
    return change.cumsum()
