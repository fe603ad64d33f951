"""Prompts from a file of JSON lines."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyquiet.checks import check_text


@dataclass(frozen=True)
class Prompt:
    """One of the prompts of a file.

    Attributes:
        index: its number, from 0 on; blank lines are not counted.
        id: what the file calls it, or None.
        field: that which holds its text.
        place: file and line.
    """

    index: int
    id: str | int | None
    field: str
    text: str
    place: str

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """A ValueError of the block names the prompt's file and line."""
        try:
            yield
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.place}: {error}") from None


def read_prompts(path: str | os.PathLike[str], fields: tuple[str, ...]) -> tuple[list[Prompt], str]:
    """The prompts of a file, and a digest of all that it says.

    Each line is an object with one of `fields`, a text, and if need be an `id`, a text or a whole number.

    Raises:
        ValueError: file and line of what is no such object or no UTF-8, or the file holds no prompt. OSError.
    """
    data = Path(path).read_bytes()
    prompts: list[Prompt] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            place = f"{os.fspath(path)}, line {number}"
            prompts.append(Prompt(len(prompts), *_read(line, fields, place), place))
    if not prompts:
        raise ValueError(f"{os.fspath(path)} holds no prompt; give lines such as {_example(fields)}")
    return prompts, hashlib.sha256(data).hexdigest()


def _read(line: bytes, fields: tuple[str, ...], place: str) -> tuple[str | int | None, str, str]:
    """Id, field and text of a line."""
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError(f"{place}: not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        why = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"{place}: no JSON ({why}); write {_example(fields)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{place}: must be an object, got {_short(values)}; write {_example(fields)}")
    if unknown := [name for name in values if name not in (*fields, "id")]:
        raise ValueError(f"{place}: unknown field {unknown[0]!r}; known are id and {' or '.join(fields)}")
    given = [name for name in fields if name in values]
    if len(given) != 1:
        what = "two texts" if given else "no text"
        raise ValueError(f"{place}: {what}; give {' or '.join(map(repr, fields))}, as in {_example(fields)}")
    (field,), text, name = given, values[given[0]], values.get("id")
    if not isinstance(text, str):
        raise ValueError(f"{place}: {field!r} must be a text, got {_short(text)}")
    if not isinstance(name, str | int | None) or isinstance(name, bool):
        raise ValueError(f"{place}: 'id' must be a text or a whole number, got {_short(name)}")
    check_text(place, f"{text}{name}")  # JSON can write half a character
    return name, field, text


def _example(fields: tuple[str, ...]) -> str:
    return json.dumps({"id": "a", fields[0]: "..."})


def _short(value: Any) -> str:
    return json.dumps(value)[:40]
