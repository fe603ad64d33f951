"""Files that appear whole or not at all, and texts that are read or refused by name."""

import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to, renamed to it when the block ends well and removed when it does not."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def check_target(path: str | os.PathLike[str]) -> Path:
    """The path, if a file can be written there; OSError, before any work is done, if not."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; give the name of a file")
    if target.exists() and not target.is_file():
        raise OSError(f"{target} is no file that can be replaced; give the name of one")
    check_writable(target.parent)
    return target


def check_writable(folder: str | os.PathLike[str], *, make: bool = False) -> None:
    """OSError, before any work is done, if no file can be written to the folder or, to `make` it, to those above it."""
    place = Path(folder)
    while make and not os.path.lexists(place):
        place = place.parent
    if not os.path.lexists(place):
        raise FileNotFoundError(f"there is no folder {folder}; make it first")
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is no folder; give the name of one")
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise OSError(f"nothing can be written to the folder {folder} ({error.strerror}); name another") from None


def lock(file: int, path: str | os.PathLike[str]) -> None:
    """Keeps an open file (its descriptor) to this process until that ends or closes it.

    Raises:
        BlockingIOError: another process has it.
    """
    try:  # not inherited by programs that are started, and gone with the process however that ends
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f"{path} is being written by another run; wait for it, or name another file") from None


def read_texts(files: Iterable[str | os.PathLike[str]]) -> list[str]:
    """What the files say, in UTF-8.

    Raises ValueError naming a file that is something else or holds no text, OSError for one that cannot be read.
    """
    texts = []
    for file in files:
        try:
            texts.append(Path(file).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not UTF-8 text") from None
        if not texts[-1].strip():
            raise ValueError(f"{file} holds no text; leave it out")
    return texts
