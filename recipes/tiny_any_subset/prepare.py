"""Write the books as documents of consecutive sentences, few and many: to train on, and held out.

python recipes/tiny_any_subset/prepare.py BOOKS_FOLDER WORK_FOLDER
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tiny_causal"))
from corpus import PARAGRAPH_BREAK, Section, read_books

LENGTHS = (40.0, 480.0)  # some 12 to 150 tokens
_TITLE = "".join(rf"(?<!\b{title}\.)" for title in ("Mr", "Mrs", "Dr", "St"))
_SENTENCE_END = re.compile(_TITLE + r"""(?:(?<=[.!?])|(?<=[.!?]["'])) +(?=["'(A-Z])""")


def documents(section: Section, lengths: random.Random, between: Sequence[float] = LENGTHS) -> list[str]:
    """The section cut behind sentences, each time when a length drawn anew is reached."""
    found, current, wanted = [], "", lengths.uniform(*between)
    for paragraph in section:
        for number, sentence in enumerate(_SENTENCE_END.split(paragraph)):
            current += ((" " if number else PARAGRAPH_BREAK) if current else "") + sentence
            if len(current) >= wanted:
                found.append(current)
                current, wanted = "", lengths.uniform(*between)
    return [*found, current] if current else found


def write(sections: list[Section], file: Path, seed: int, between: Sequence[float]) -> None:
    lengths = random.Random(seed)
    texts = [text for section in sections for text in documents(section, lengths, between)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    print(f"{file}: {len(texts)} documents, {sum(map(len, texts))} characters")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("books", type=Path, help="folder of the books, one .txt file each")
    parser.add_argument("work", type=Path, help="folder for train.jsonl and held_out.jsonl")
    what = "characters at which a document ends with the sentence that reaches them"
    parser.add_argument("--lengths", nargs=2, type=float, default=LENGTHS, metavar=("LOW", "HIGH"), help=what)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    books = read_books(args.books)
    write([section for book in books for section in book.train], args.work / "train.jsonl", 0, args.lengths)
    write([section for book in books for section in book.held_out], args.work / "held_out.jsonl", 1, args.lengths)


if __name__ == "__main__":
    main()
