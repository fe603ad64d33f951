"""The file that a run can be resumed from: one line of JSON for each stage that was committed, never changed again.

The first line is the header: what must be the same for the run to go on. Every line ends with the CRC of all lines so
far, so that one that was changed, lost or moved is noticed. A line is with the operating system when `commit` returns,
so that a process that is killed loses nothing, and on the disk within a second or 64 records.
"""

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from zlib import crc32

from pyquiet.files import check_target, lock
from pyquiet.scaling.records import Record

SYNC_SECONDS, SYNC_RECORDS = 1.0, 64

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
_MISSING = object()


@dataclass(frozen=True)
class _Contents:
    header: dict[str, Any]
    records: list[Record]
    size: int  # bytes up to the end of the last whole line
    crc: int


class Journal:
    """An append-only file of records, written by one process at a time, from `create` or `open` to `close`.

    Attributes:
        header: what the file began with, as JSON values.
        records: those that were in the file when it was opened, in its order.
    """

    def __init__(self, path: Path, file: int, contents: _Contents) -> None:
        """Use `create` or `open`."""
        self.path, self.header, self.records = path, contents.header, contents.records
        self._file, self._size, self._crc = file, contents.size, contents.crc
        self._keys = {record.key for record in contents.records}
        self._unsynced, self._closed = 0, False
        self._failure: OSError | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._sync, name=f"journal {path.name}", daemon=True)
        self._thread.start()

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: Mapping[str, Any]) -> Self:
        """A new file that begins with the header.

        Raises:
            FileExistsError: there is one already. FileNotFoundError, IsADirectoryError: no file can be there.
            TypeError, ValueError: the header holds what JSON has no word for.
        """
        target, (line, crc) = check_target(path), _line({"header": header}, 0)
        try:
            file = os.open(target, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            raise FileExistsError(f"{target} exists; resume that run, or name another file") from None
        try:
            lock(file, target)
            return cls(target, file, _begin(file, target, line, crc))
        except BaseException:
            os.close(file)
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], header: Mapping[str, Any]) -> Self:
        """A file to be continued. A last line that was not written whole is dropped.

        Raises:
            ValueError: the header differs (the first field that does is named), a line that is not the last one is
                broken, or a key stands twice. BlockingIOError: another process writes it. FileNotFoundError.
        """
        target, (line, crc) = Path(path), _line({"header": header}, 0)
        file = os.open(target, os.O_RDWR | os.O_APPEND)
        try:
            lock(file, target)
            if os.fstat(file).st_size < len(line) and line.startswith(target.read_bytes()):
                os.ftruncate(file, 0)  # the header itself was cut short
                return cls(target, file, _begin(file, target, line, crc))
            contents = _read(target)
            _check_header(target, contents.header, json.loads(_encode(header)))
            os.ftruncate(file, contents.size)
            return cls(target, file, contents)
        except BaseException:
            os.close(file)
            raise

    def commit(self, record: Record) -> None:
        """Appends a record; when this returns it outlives the process.

        Raises:
            ValueError: its key was committed before, a number in it is not finite, or the journal is closed.
            OSError: it could not be written, and the file ends as before; or an earlier record did not reach the disk.
        """
        with self._changed:
            self._check()
            if record.key in self._keys:
                raise ValueError(f"{self.path}: {record.key} was committed before")
            line, crc = _line(record.to_dict(), self._crc)
            try:
                _write(self._file, line)
            except BaseException:  # no room on the disk, or Ctrl-C
                os.ftruncate(self._file, self._size)
                raise
            self._size, self._crc = self._size + len(line), crc
            self._keys.add(record.key)
            self._unsynced += 1
            if self._unsynced in (1, SYNC_RECORDS):
                self._changed.notify()

    def flush(self) -> None:
        """Waits until all that was committed is on the disk."""
        with self._changed:
            self._check()
            os.fsync(self._file)
            self._unsynced = 0

    def close(self) -> None:
        """Flushes, and lets another process have the file; a second time does nothing."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify()
        self._thread.join()
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check(self) -> None:
        if self._closed:
            raise ValueError(f"the journal {self.path} is closed")
        if self._failure is not None:
            raise self._failure

    def _sync(self) -> None:
        """The thread: brings what was written to the disk a second after the first record, or at once after many."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unsynced or self._closed)
                self._changed.wait_for(lambda: self._unsynced >= SYNC_RECORDS or self._closed, SYNC_SECONDS)
                if self._closed:
                    return
                self._unsynced = 0
            try:
                os.fsync(self._file)
            except OSError as error:
                self._failure = error
                return


def read_journal(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Record]]:
    """Header and records of a file, also of one that is being written. A last line that is not whole is left out.

    Raises ValueError, naming the line, for a broken one elsewhere, for a key that stands twice, or no header.
    """
    contents = _read(Path(path))
    return contents.header, contents.records


def _line(values: Mapping[str, Any], crc: int) -> tuple[bytes, int]:
    """The line of some values behind lines of that CRC, and the CRC with it."""
    body = _encode(values).encode()
    crc = crc32(body, crc)
    return b'%s,"crc":"%08x"}\n' % (body[:-1], crc), crc


def _parse(line: bytes, crc: int) -> tuple[dict[str, Any], int] | None:
    """What `_line` was given, and the CRC with it; None if the line is not whole."""
    body = line[: -len(',"crc":"00000000"}\n')] + b"}"
    crc = crc32(body, crc)
    if not line.endswith(b',"crc":"%08x"}\n' % crc):
        return None
    return json.loads(body), crc


def _read(path: Path) -> _Contents:
    header, records, keys, size, crc = None, [], set(), 0, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            parsed = _parse(line, crc)
            if parsed is None:
                if header is not None and not file.read(1):
                    break
                raise ValueError(f"{path}, line {number}: broken, or not of a journal; restore the file from a copy")
            values, crc = parsed
            size += len(line)
            try:
                if header is None:
                    header = values["header"]
                    continue
                records.append(Record.from_dict(values))
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no record of this version of pyquiet ({error})") from None
            if records[-1].key in keys:
                raise ValueError(f"{path}, line {number}: {records[-1].key} stands twice")
            keys.add(records[-1].key)
    if header is None:
        raise ValueError(f"{path} has no header, so it is no journal")
    return _Contents(header, records, size, crc)


def _begin(file: int, path: Path, line: bytes, crc: int) -> _Contents:
    """Writes the header, and sees to it that the file will be found after a loss of power."""
    _write(file, line)
    os.fsync(file)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return _Contents(json.loads(line)["header"], [], len(line), crc)


def _write(file: int, line: bytes) -> None:
    while line:
        line = line[os.write(file, line) :]


def _check_header(path: Path, found: Any, given: Any, field: str = "") -> None:
    """ValueError at the first field that differs."""
    if isinstance(found, dict) and isinstance(given, dict):
        for key in [*found, *(key for key in given if key not in found)]:
            _check_header(path, found.get(key, _MISSING), given.get(key, _MISSING), f"{field}.{key}".lstrip("."))
    elif isinstance(found, list) and isinstance(given, list) and len(found) == len(given):
        for i, pair in enumerate(zip(found, given, strict=True)):
            _check_header(path, *pair, f"{field}[{i}]")
    elif found != given:
        if isinstance(found, list) and isinstance(given, list):
            words = f"{len(found)} {field}, and now there are {len(given)}"
        else:
            was, now = ("missing" if value is _MISSING else _encode(value)[:200] for value in (found, given))
            words = f"another {field}: it was {was} and is now {now}"
        raise ValueError(f"{path} was begun with {words}; resume with what it was begun with, or name another file")
