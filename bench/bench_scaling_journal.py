"""What a journal of test-time scaling takes of a run: microseconds for each committed stage.

The goal of the issue: under 2 % of the wall time at 200 records a second, so under 100 us a record.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pyquiet.scaling.backends.base import Usage
from pyquiet.scaling.journal import Journal, read_journal
from pyquiet.scaling.records import Decision, Key, Record, Timing

from .machine import Machine
from .timing import best_seconds

RATE = 200  # records a second
TIMING = Timing(1.0123456789, 2.0123456789, 3.0123456789, 7)
SCORED = Record(
    Key("run", "question-17", 3, 0, "score"),
    seed=2**61,
    prompt="0" * 32,
    usage=Usage(1500, 1000, 1),
    timing=TIMING,
    score=0.4861234567890123,
    decision=Decision("continue", "p", 0.3861234567890123, 1600, "0" * 16, True),
)


def drafted(tokens: int) -> Record:
    return Record(
        Key("run", "question-17", 3, 0, "draft"),
        seed=2**61,
        prompt="0" * 32,
        ids=tuple(range(100_000, 100_000 + tokens)),
        text="Let x be 3.\n" * (tokens // 4),
        finish="length",
        usage=Usage(1000, 0, tokens),
        timing=TIMING,
    )


def numbered(record: Record) -> Iterator[Record]:
    """The record again and again, each time as a new chain's."""
    return (replace(record, key=replace(record.key, chain=i)) for i in itertools.count())


@pytest.mark.parametrize(
    ("name", "record"), [("score", SCORED), ("100 tokens", drafted(100)), ("500 tokens", drafted(500))]
)
def test_commit(benchmark: BenchmarkFixture, machine: Machine, tmp_path: Path, name: str, record: Record) -> None:
    """One record, its key made new, to a file of the folder for temporary files."""
    records = numbered(record)
    with Journal.create(tmp_path / "run.jsonl", {}) as journal:
        seconds = best_seconds(benchmark, lambda: journal.commit(next(records)))
    committed = read_journal(tmp_path / "run.jsonl")[1]
    assert len(committed) == next(records).key.chain
    assert replace(committed[-1], key=record.key) == record
    info = {"method": name, "microseconds": seconds * 1e6, "mean_microseconds": benchmark.stats.stats.mean * 1e6}
    info["share_of_wall"] = benchmark.stats.stats.mean * RATE
    benchmark.extra_info.update(table=f"journal, a record; share of wall at {RATE} records/s", goal=0.02, **info)
