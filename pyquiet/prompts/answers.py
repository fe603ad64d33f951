"""The answers of a run on disk: a file for each rank while it runs, one file of all in their order at the end.

A rank's file begins with the header, what must be the same for the run to go on. Every other line is a batch: its
answers, each a number of a prompt and rows, and what it cost. A line is on the disk before the next batch begins; one
that was cut off is dropped, and its batch computed again.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from pyquiet.checks import some_of
from pyquiet.files import lock, replacing
from pyquiet.prompts.fingerprint import check_same

Row = dict[str, Any]
Cost = dict[str, float]  # sums: of tokens, calls, seconds
Header = Mapping[str, Any]

_OTHER_RUN = "resume with what it was begun with, name another --output, or remove it to begin anew"
_OPENING = b'{"header": '


class Batch(NamedTuple):
    """Answered prompts, by their numbers, what they cost, and where the line of it begins and ends."""

    answers: dict[int, list[Row]]
    cost: Cost
    start: int
    end: int


class Part:
    """The file of one rank, open for writing by one process at a time."""

    def __init__(self, output: Path, rank: int, header: Header) -> None:
        """Makes the file, or drops from it what was cut off.

        Raises:
            ValueError: as `read_part`. BlockingIOError: another process writes it. OSError.
        """
        self.path, self.header = output.with_name(f"{output.name}.rank{rank}"), header
        self._file = self.path.open("ab")
        try:
            lock(self._file.fileno(), self.path)
            end = max((batch.end for batch in read_part(self.path, header)), default=0)
            self._file.truncate(end)
            self._file.seek(end)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def append(self, answers: Iterable[tuple[int, Sequence[Row]]], cost: Cost) -> None:
        """Writes a batch; when this returns it outlives the process and the machine."""
        if not self._file.tell():
            self._file.write(_line({"header": self.header}))
        self._file.write(_line({"answers": list(answers), "cost": cost}))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __exit__(self, *exception: object) -> None:
        if not self._file.tell():  # nothing came of it
            self.path.unlink(missing_ok=True)
        self._file.close()


def parts_of(output: Path) -> list[Path]:
    """The files of all ranks, also of runs of more ranks."""
    name = re.compile(re.escape(output.name) + r"\.rank\d+")
    return sorted(path for path in output.parent.iterdir() if name.fullmatch(path.name))


def read_part(path: Path, header: Header) -> Iterator[Batch]:
    """Each whole batch of a rank's file; nothing of a file without one.

    Raises:
        ValueError: it belongs to a run with another header, or a line that is not the last one is broken.
    """
    with path.open("rb") as file:
        head, broken = file.readline(), ValueError(f"{path}: broken, or no file of a run; restore it, or remove it")
        if not head.startswith(_OPENING) and not _OPENING.startswith(head):
            raise broken
        start = len(head)
        while line := file.readline():
            values, end = _parsed(line), file.tell()
            if values is None and not file.read(1):
                return
            if values is None or (first := _parsed(head)) is None:
                raise broken
            if start == len(head):
                check_same(first["header"], header, f"{path} was begun with", _OTHER_RUN)
            yield Batch(dict(values["answers"]), values["cost"], start, end)
            start = end


def answered(output: Path, header: Header) -> set[int]:
    """The numbers of the prompts that have answers; ValueError as `read_part`."""
    return {i for path in parts_of(output) for batch in read_part(path, header) for i in batch.answers}


def finished(output: Path, header: Header) -> Cost | None:
    """What a finished run of this header cost; None if there is no output.

    Raises:
        ValueError: the output is that of another run.
    """
    if not output.exists():
        return None
    try:
        record = json.loads(record_of(output).read_bytes())
        cost: Cost = record.pop("cost")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{output} exists, and nothing tells that this command wrote it; name another file") from None
    check_same(record, header, f"{output} was made with", _OTHER_RUN)
    return cost


def record_of(output: Path) -> Path:
    """The file that tells how an output was made: the header, and what it cost."""
    return output.with_name(f"{output.name}.run.json")


def merge(output: Path, header: Header, count: int) -> Cost:
    """Writes all rows in the order of prompts, removes the ranks' files, and returns what all cost.

    Raises:
        ValueError: there are prompts without an answer; or as `read_part`.
    """
    places, cost = dict[int, tuple[Path, int]](), Cost()
    for path in parts_of(output):
        for batch in read_part(path, header):
            places |= dict.fromkeys(batch.answers, (path, batch.start))
            cost = {name: cost.get(name, 0) + value for name, value in batch.cost.items()}
    if missing := [str(i) for i in range(count) if i not in places]:
        raise ValueError(
            f"{output}: {len(missing)} prompts have no answer ({some_of(missing)}); the output must lie on a file "
            "system that all ranks share: bring the files that end in .rank* together and give the command again"
        )
    with replacing(record_of(output)) as record:
        record.write_text(json.dumps({**header, "cost": cost}, indent=2) + "\n", encoding="utf-8")
    with replacing(output) as target, target.open("wb") as file:
        for row in _rows([places[i] for i in range(count)]):
            file.write(_line(row))
        file.flush()
        os.fsync(file.fileno())
    remove_parts(output)
    return cost


def remove_parts(output: Path) -> None:
    """Removes the files of all ranks."""
    for path in parts_of(output):
        path.unlink()


def _rows(places: Iterable[tuple[Path, int]]) -> Iterator[Row]:
    """The rows of prompts, each of which is in the batch at its place."""
    last, answers = None, {}
    for number, place in enumerate(places):
        if place != last:
            path, start = last = place
            with path.open("rb") as file:
                file.seek(start)
                answers = dict(json.loads(file.readline())["answers"])
        yield from answers[number]


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _parsed(line: bytes) -> dict[str, Any] | None:
    """What `_line` was given; None if the line is not whole."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return values if isinstance(values, dict) else None
