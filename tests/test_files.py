"""Files that appear whole or not at all, and what is known of a place before any work is done."""

import os
from pathlib import Path

import pytest

from pyquiet.files import check_target, check_writable, lock, read_texts, replacing


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (".", "is a folder; give the name of a file"),
        ("none/out.json", "there is no folder"),
        ("pipe", "is no file that can be replaced"),
        ("/proc/out.json", "nothing can be written to the folder /proc"),
    ],
)
def test_a_target_that_cannot_be_written_is_known_at_once(tmp_path: Path, monkeypatch, path: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(OSError, match=words):
        check_target(path)


def test_looking_at_a_target_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    assert check_target(tmp_path / "new.json") == tmp_path / "new.json"
    assert check_target(str(tmp_path / "old.json")).read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["old.json"]


def test_a_folder_that_is_yet_to_be_made_is_looked_at_without_a_trace(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match="make it first"):
        check_writable(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    check_writable("a/b", make=True)
    check_writable(tmp_path / "a" / "b", make=True)
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to("gone")
    for name in ("file", "file/below", "nowhere"):
        with pytest.raises(NotADirectoryError, match=f"{name.split('/')[0]} is no folder"):
            check_writable(tmp_path / name, make=True)
    with pytest.raises(OSError, match="nothing can be written to the folder /proc/a"):
        check_writable("/proc/a", make=True)


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "page"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as partial:  # noqa: PT012
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "link").hardlink_to(path)
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert (tmp_path / "link").read_text() == "old"  # a new file took the name
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\xff\xd8")
    with pytest.raises(ValueError, match=r"picture is not UTF-8 text"):
        read_texts([tmp_path / "picture"])


@pytest.mark.parametrize("nothing", ["", " \n"])
def test_what_holds_no_text_is_named(tmp_path: Path, nothing: str) -> None:
    (tmp_path / "full").write_text("words")
    (tmp_path / "empty").write_text(nothing)
    with pytest.raises(ValueError, match="empty holds no text"):
        read_texts([tmp_path / "full", tmp_path / "empty"])


def test_a_file_is_locked_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("ab") as first, path.open("ab") as second:
        lock(first.fileno(), path)
        with pytest.raises(BlockingIOError, match=r"file is being written by another run; wait for it"):
            lock(second.fileno(), path)
    with path.open("ab") as third:
        lock(third.fileno(), path)
