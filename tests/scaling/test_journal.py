"""Journals: what was committed comes back, whatever happened to the process or the file."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyquiet.scaling import journal as module
from pyquiet.scaling.backends.base import Usage
from pyquiet.scaling.journal import Journal, read_journal
from pyquiet.scaling.records import Decision, Key, Record, Timing

HEADER = {"version": 1, "config": {"takeover_rate": 0.4, "stop": ["\n\n"]}, "questions": [{"id": "q0", "answer": "4"}]}


def record(turn: int = 0, stage: str = "draft") -> Record:
    return Record(Key("run", "q0", 3, turn, stage), seed=2**62, ids=(1, 2), text='a\u2028"\ud800é', finish="length")


FULL = Record(
    Key("run", "q0", 3, 1, "score", attempt=2),
    seed=5,
    prompt="hash",
    usage=Usage(10, 4, 1),
    timing=Timing(0.1, 0.25, 1 / 3, 7, 2),
    score=0.1,
    decision=Decision("continue", "p", 1 / 3, 16, "v", True),
)
END = Record(Key("run", "q0", 3, 2, "end"), outcome="answer", answer=r"\frac{1}{2}")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


def written(path: Path, *records: Record) -> list[bytes]:
    """The lines of a journal of these records."""
    with Journal.create(path, HEADER) as journal:
        for each in records:
            journal.commit(each)
    return path.read_bytes().splitlines(keepends=True)


def test_what_was_committed_comes_back(path: Path) -> None:
    written(path, record(), FULL, END)
    assert read_journal(path) == (HEADER, [record(), FULL, END])
    with Journal.open(path, HEADER) as journal:
        assert (journal.header, journal.records) == (HEADER, [record(), FULL, END])


def test_a_run_goes_on_behind_the_last_line(path: Path) -> None:
    written(path, record())
    with Journal.open(path, HEADER) as journal:
        journal.commit(FULL)
    assert read_journal(path)[1] == [record(), FULL]


def test_every_cut_of_the_last_line_drops_it_alone(path: Path) -> None:
    lines = written(path, record(), FULL)
    for cut in range(len(lines[2])):
        path.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
        assert read_journal(path)[1] == [record()]
        with Journal.open(path, HEADER) as journal:
            journal.commit(END)
        assert read_journal(path)[1] == [record(), END]


def test_a_header_that_was_cut_short_is_written_again(path: Path) -> None:
    (header,) = written(path)
    for cut in range(len(header)):
        path.write_bytes(header[:cut])
        with Journal.open(path, HEADER) as journal:
            journal.commit(END)
        assert read_journal(path) == (HEADER, [END])


def test_a_text_that_is_no_journal_is_left_as_it_is(path: Path) -> None:
    for text in (b"notes", b"notes\n", b'{"header":{"version":2'):
        path.write_bytes(text)
        with pytest.raises(ValueError, match="line 1: broken"):
            Journal.open(path, HEADER)
        assert path.read_bytes() == text


def test_every_byte_that_changes_in_the_middle_is_an_error_that_names_the_line(path: Path) -> None:
    lines = written(path, record(), FULL, END)
    begin = len(lines[0])
    whole = bytearray(b"".join(lines))
    for place in range(begin, begin + len(lines[1])):
        broken = bytearray(whole)
        broken[place] ^= 1
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"{path}, line 2: broken"):
            read_journal(path)
    with pytest.raises(ValueError, match="line 2: broken"):
        Journal.open(path, HEADER)
    assert path.read_bytes() == broken


@pytest.mark.parametrize("order", [(0, 2, 3), (0, 2, 1, 3), (0, 1, 1, 2, 3)])
def test_lines_that_are_lost_moved_or_doubled_are_noticed(path: Path, order: tuple[int, ...]) -> None:
    lines = written(path, record(), FULL, END)
    path.write_bytes(b"".join(lines[i] for i in order))
    with pytest.raises(ValueError, match=r"line [23]: broken"):
        read_journal(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (HEADER | {"version": 2}, "another version: it was 1 and is now 2"),
        (HEADER | {"config": {"takeover_rate": 0.5, "stop": ["\n\n"]}}, "another config.takeover_rate: it was 0.4"),
        (
            HEADER | {"config": {"takeover_rate": 0.4, "stop": []}},
            r"was begun with 1 config\.stop, and now there are 0",
        ),
        (HEADER | {"questions": [{"id": "q1", "answer": "4"}]}, r'another questions\[0\].id: it was "q0"'),
        (HEADER | {"engine": "sync"}, 'another engine: it was missing and is now "sync"'),
        ({"version": 1, "config": HEADER["config"]}, "another questions: .* is now missing"),
    ],
)
def test_another_header_is_refused_by_its_field(path: Path, header: dict, words: str) -> None:
    lines = written(path, record())
    with pytest.raises(ValueError, match=words):
        Journal.open(path, header)
    assert path.read_bytes() == b"".join(lines)


def test_tuples_in_a_header_are_lists(path: Path) -> None:
    Journal.create(path, {"stop": ("a", "b")}).close()
    Journal.open(path, {"stop": ("a", "b")}).close()


def test_a_key_is_committed_at_most_once(path: Path) -> None:
    with Journal.create(path, HEADER) as journal:
        journal.commit(record())
        with pytest.raises(ValueError, match=r"Key\(phase='run'.* was committed before"):
            journal.commit(record())
    with Journal.open(path, HEADER) as journal, pytest.raises(ValueError, match="committed before"):
        journal.commit(record())
    assert read_journal(path)[1] == [record()]


def test_a_key_that_stands_twice_in_a_file_is_an_error(path: Path) -> None:
    with Journal.create(path, HEADER) as journal:
        journal.commit(record())
        journal._keys.clear()
        journal.commit(record())
    with pytest.raises(ValueError, match=r"line 3: .* stands twice"):
        read_journal(path)


def test_a_line_of_another_version_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal.create(path, HEADER) as journal:
        monkeypatch.setattr(Record, "to_dict", lambda self: {"chain": 3})
        journal.commit(record())
    with pytest.raises(ValueError, match="line 2: no record of this version"):
        read_journal(path)


def test_numbers_that_are_not_finite_are_refused_and_leave_nothing(path: Path) -> None:
    with Journal.create(path, HEADER) as journal:
        with pytest.raises(ValueError, match="JSON"):
            journal.commit(Record(record().key, score=float("nan")))
        journal.commit(record())
    assert read_journal(path)[1] == [record()]


def test_a_write_that_fails_half_way_leaves_the_file_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) < 40:
            raise OSError(28, "No space left on device")
        return write(file, data[: len(data) // 2])

    with Journal.create(path, HEADER) as journal:
        journal.commit(record())
        monkeypatch.setattr(module.os, "write", full)
        with pytest.raises(OSError, match="No space"):
            journal.commit(FULL)
        monkeypatch.undo()
        journal.commit(FULL)
    assert read_journal(path)[1] == [record(), FULL]


def test_a_file_that_exists_is_not_begun_again(path: Path) -> None:
    lines = written(path, record())
    with pytest.raises(FileExistsError, match="resume that run, or name another file"):
        Journal.create(path, HEADER)
    assert path.read_bytes() == b"".join(lines)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Journal.create(path / "no" / "run.jsonl", HEADER)
    with pytest.raises(FileNotFoundError):
        Journal.open(path.with_name("none.jsonl"), HEADER)


def test_a_closed_journal_takes_nothing(path: Path) -> None:
    journal = Journal.create(path, HEADER)
    journal.close()
    journal.close()
    for call in (lambda: journal.commit(record()), journal.flush):
        with pytest.raises(ValueError, match="is closed"):
            call()


def test_two_cannot_write_one_file(path: Path) -> None:
    with Journal.create(path, HEADER), pytest.raises(BlockingIOError, match="being written by another run"):
        Journal.open(path, HEADER)
    Journal.open(path, HEADER).close()


WRITER = """
import sys
from tests.scaling.test_journal import *
journal = Journal.create(sys.argv[1], HEADER)
for turn in range(10**9):
    journal.commit(record(turn))
    print(turn, flush=True)
"""


def test_what_was_committed_outlives_kill_9_and_the_lock_does_not(path: Path) -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=root) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) == 100:
                break
        with pytest.raises(BlockingIOError):
            Journal.open(path, HEADER)
        writer.send_signal(signal.SIGKILL)
        said = int((writer.stdout.read().split() or [100])[-1])
        writer.wait(30)
    with Journal.open(path, HEADER) as journal:
        assert [r.key.turn for r in journal.records] == list(range(len(journal.records)))
        assert said < len(journal.records) <= said + 2
        journal.commit(record(10**9))
    assert len(read_journal(path)[1]) == len(journal.records) + 1


def test_records_reach_the_disk_soon_and_64_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a delay of a minute only their number brings them there, with a short one the first comes alone."""
    synced, sync = threading.Event(), os.fsync
    monkeypatch.setattr(module.os, "fsync", lambda file: (sync(file), synced.set()))
    monkeypatch.setattr(module, "SYNC_SECONDS", 60.0)
    with Journal.create(path, HEADER) as journal:
        synced.clear()
        for turn in range(63):
            journal.commit(record(turn))
        assert not synced.wait(0.2)
        journal.commit(record(63))
        assert synced.wait(30)
    monkeypatch.setattr(module, "SYNC_SECONDS", 0.01)
    with Journal.open(path, HEADER) as journal:
        synced.clear()
        journal.commit(record(64))
        assert synced.wait(30)


def test_a_disk_that_fails_is_told_at_the_next_commit(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.create(path, HEADER)

    def fails(file: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "fsync", fails)
        patched.setattr(module, "SYNC_SECONDS", 0.0)
        journal.commit(record())
        journal._thread.join(30)
        with pytest.raises(OSError, match="Input/output"):
            journal.commit(FULL)
    with pytest.raises(OSError, match="Input/output"):
        journal.close()
    assert read_journal(path)[1] == [record()]


def test_commits_from_many_threads_all_arrive(path: Path) -> None:
    with Journal.create(path, HEADER) as journal, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda turn: journal.commit(record(turn)), range(500)))
    assert sorted(r.key.turn for r in read_journal(path)[1]) == list(range(500))
