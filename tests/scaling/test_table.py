"""Tables of records: what goes in comes out, groups, and how little a row takes."""

import tracemalloc

import numpy as np
import pytest

from pyquiet.scaling.backends.base import Usage
from pyquiet.scaling.records import Decision, Key, Record, Timing
from pyquiet.scaling.table import Rows, Table

SCORE = Record(
    Key("run", "b", 7, 2, "score", attempt=1),
    usage=Usage(100, 40, 1),
    timing=Timing(0.25, 0.5, 1 / 3, 3, 2),
    score=0.1,
    decision=Decision("replace", "p", 0.25, 16, "v", True, "why", True),
)
END = Record(Key("presample", "a", 0, 0, "end"), outcome="answer", answer="5")


def test_columns_hold_what_records_say() -> None:
    table = Table([SCORE, END])
    rows = table.rows()
    expected = {
        "phase": [0, 1], "question": [0, 1], "chain": [7, 0], "turn": [2, 0], "stage": [1, 3], "attempt": [1, 0],
        "prompt_tokens": [100, 0], "cached_tokens": [40, 0], "completion_tokens": [1, 0],
        "queued": [0.25, 0], "started": [0.5, 0], "ended": [1 / 3, 0], "slot": [3, -1], "tries": [2, 0],
        "score": [0.1, np.nan], "p": [0.25, np.nan], "action": [2, -1], "reason": [0, -1], "n": [16, 0],
        "version": [0, -1], "guaranteed": [True, False], "near_tie": [True, False], "outcome": [-1, 0],
        "answer": [-1, 0],
    }  # fmt: skip
    for name, values in expected.items():
        assert np.array_equal(rows[name], values, equal_nan=name in ("score", "p")), name
    assert table.questions.all == ["b", "a"]
    assert (table.phases[1], table.answers[0], table.outcomes[0], table.versions[0]) == (
        "presample",
        "5",
        "answer",
        "v",
    )
    assert [len(part) for part in (rows.timed, rows.stage("end"), rows.where(rows["turn"] == 2))] == [1, 1, 1]


def of(pairs: "list[tuple[str, int]]") -> Rows:
    return Table(Record(Key("run", question, chain, i, "draft")) for i, (question, chain) in enumerate(pairs)).rows()


def test_groups_are_numbered_as_they_appear() -> None:
    rows = of([("b", 1), ("a", 1), ("b", 0), ("a", 1), ("b", 1)])
    assert rows.groups("question").tolist() == [0, 1, 0, 1, 0]
    assert rows.groups("question", "chain").tolist() == [0, 1, 2, 1, 0]
    assert [part["turn"].tolist() for part in rows.split("question")] == [[0, 2, 4], [1, 3]]
    later = rows.where(np.array([3, 2]))
    assert later.groups("question").tolist() == [0, 1]
    assert list(rows.where(rows["turn"] > 9).split("question")) == []


def test_a_row_takes_a_hundred_bytes_whatever_texts_the_record_holds() -> None:
    table = Table()
    tracemalloc.start()
    try:
        for chain in range(5000):
            table.add(Record(Key("run", "q", chain, 0, "draft"), text="so " * (chain % 1000), score=chain / 7))
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held < 150 * 5000


def test_a_table_grows_while_no_rows_are_held() -> None:
    table = Table([END])
    rows = table.rows()
    with pytest.raises(BufferError):
        table.add(END)
    del rows
    table.add(END)
    assert len(table.rows()) == 2
