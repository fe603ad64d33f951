"""Questions as users have them: texts, dicts, lines of a file."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from pyquiet.files import read_texts
from pyquiet.scaling.answers import extract
from pyquiet.scaling.records import Question

Asked = str | Mapping[str, Any] | Question
_ID, _TEXT, _ANSWER = ("id", "unique_id"), ("question", "problem", "prompt", "text"), ("answer", "solution")


def as_questions(questions: Iterable[Asked]) -> list[Question]:
    """Questions of texts, of dicts with the fields of a `Question` (`question`, `problem`, `prompt` or `text` for the
    text; `answer`, or a `solution` that ends with it; `id`, or the place in the list), or of what they are already.

    Raises:
        TypeError, ValueError: another kind, a dict without a text, an id that comes twice, or no question at all.
    """
    if isinstance(questions, str | Mapping | Question):
        raise TypeError("questions must be a list; for a single one pass [question]")
    read = [_question(item, place) for place, item in enumerate(questions)]
    if not read:
        raise ValueError("questions must hold at least one question, got none")
    seen: set[str] = set()
    for question in read:
        if question.id in seen:
            raise ValueError(f"questions: the id {question.id!r} comes twice; ids name questions in seeds and journals")
        seen.add(question.id)
    return read


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """The questions of a JSONL file, an object a line, as `as_questions` takes them; `answer` may be any JSON value.

    Raises ValueError naming the line that holds something else, OSError for a file that cannot be read.
    """
    items = []
    (text,) = read_texts([path])
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                items.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: no JSON object ({error})") from None
    return as_questions(items)


def _question(item: Asked, place: int) -> Question:
    if isinstance(item, Question):
        if not isinstance(item.text, str):
            raise TypeError(f"questions[{place}].text must be a text, got {item.text!r}")
        return item
    if isinstance(item, str):
        return Question(str(place), item)
    if not isinstance(item, Mapping):
        raise TypeError(f"questions[{place}] must be a text, a dict or a Question, got {type(item).__name__}")
    text = next((item[name] for name in _TEXT if name in item), None)
    if not isinstance(text, str):
        raise ValueError(
            f"questions[{place}] has no text: give it one as {', '.join(map(repr, _TEXT))}, got {list(item)}"
        )
    name = next((str(item[name]) for name in _ID if name in item), str(place))
    return Question(name, text, _answer(item), str(item.get("group", "")))


def _answer(item: Mapping[str, Any]) -> str | None:
    """The right answer; of a worked solution, as some data sets give it, the answer that it ends with."""
    given = next((str(item[name]) for name in _ANSWER if item.get(name) is not None), None)
    return None if given is None else extract(given) or given
