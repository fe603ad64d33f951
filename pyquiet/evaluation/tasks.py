"""Questions with short answers: the files of GSM8K and CommonsenseQA, and how an answer is spelt in tokens."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pyquiet.tokens import continuation_ids

DIGITS, LETTERS = "0123456789", "ABCDE"


@dataclass(frozen=True)
class AnswerItem:
    """A question, with its choices where it has some, and what stands right behind "A:", a leading space included."""

    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """What the answer is written behind."""
        return f"Q: {self.question}\nA:"


def read_gsm8k(path: str | os.PathLike[str]) -> list[AnswerItem]:
    """The items of a GSM8K file: JSON lines with `question` and `answer`, the number behind "####".

    Raises ValueError, naming file and line, for anything else.
    """

    def item(record: dict[str, Any]) -> AnswerItem:
        answer = record["answer"].partition("####")[2].rstrip()
        int(answer.replace(",", ""))
        return AnswerItem(record["question"], answer)

    return _read(path, item, 'a GSM8K item with "question" and an "answer" whose integer stands behind "####"')


def read_commonsenseqa(path: str | os.PathLike[str]) -> list[AnswerItem]:
    """The items of a CommonsenseQA file: JSON lines with `question`, `choices` (`label`, `text`) and `answerKey`.

    The choices follow the question as lines "(A) ...". Raises ValueError, naming file and line, for anything else.
    """

    def item(record: dict[str, Any]) -> AnswerItem:
        labels, texts = record["choices"]["label"], record["choices"]["text"]
        if "".join(labels) != LETTERS or record["answerKey"] not in labels:
            raise ValueError
        lines = [record["question"], *(f"({label}) {text}" for label, text in zip(labels, texts, strict=True))]
        return AnswerItem("\n".join(lines), f" {record['answerKey']}")

    return _read(path, item, 'a CommonsenseQA item with "question", "choices" A to E and an "answerKey"')


def _read(
    path: str | os.PathLike[str], item: Callable[[dict[str, Any]], AnswerItem], expected: str
) -> list[AnswerItem]:
    items = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            items.append(item(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{os.fspath(path)}, line {number}: not {expected}") from None
    if not items:
        raise ValueError(f"{os.fspath(path)} has no items")
    return items


@dataclass(frozen=True)
class Task:
    """A file format and the symbols its answers are made of."""

    read: Callable[[str | os.PathLike[str]], list[AnswerItem]]
    symbols: str


TASKS = {"gsm8k": Task(read_gsm8k, DIGITS), "commonsenseqa": Task(read_commonsenseqa, LETTERS)}


def spell(tokenizer: PreTrainedTokenizerBase, answer: str, symbols: str) -> tuple[list[int], list[list[int]]]:
    """An answer and its newline in tokens, and for each token the valid set it is scored against, newline last.

    A token's set is that of the tokens which stand in its place when the answer is written with one other symbol
    throughout, and the newline; so a form with a leading space is found where the tokenizer has one. Tokens that are
    the same whatever the symbols (a space, a comma, a sign) are given and not scored: their set is empty.

    Raises:
        ValueError: the answer holds no symbol, or the tokenizer does not write it a symbol a token.
    """

    def ids(text: str) -> list[int]:
        return continuation_ids(tokenizer, "Q: ?\nA:", text + "\n")

    written = [s for s in answer if s in symbols]
    others = [ids("".join(other if s in symbols else s for s in answer)) for other in symbols]
    places = list(zip(*others, strict=False))  # of each token, what stands there for each symbol
    scored = [len({*place} - {tokenizer.unk_token_id}) == len(symbols) for place in places]
    tokens = ids(answer)
    last = len(tokens) - 1
    expected = iter(written)
    fits = (
        written
        and {len(other) for other in others} == {len(tokens)}
        and sum(scored) == len(written)
        and scored[-2:] == [True, False]
        and all(
            token == (place[symbols.index(next(expected))] if is_scored else place[0])
            for token, place, is_scored in zip(tokens, places, scored, strict=True)
        )
    )
    if not fits:
        pieces = tokenizer.convert_ids_to_tokens(tokens)
        raise ValueError(
            f"tokenizer: it writes the answer {answer!r} and its newline as {pieces}, not as a token for each of "
            f"{symbols!r} and one for the newline, so its restricted probability is not defined; take a model whose "
            "tokenizer does, one that splits numbers into digits"
        )
    newline = tokens[last]
    valid = [[*place, newline] if is_scored else [] for place, is_scored in zip(places, scored, strict=True)]
    valid[last] = valid[last - 1]
    return tokens, valid
