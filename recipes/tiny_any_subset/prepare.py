"""Write the books as documents of consecutive sentences, few and many, and stories: to train on, and held out.

python recipes/tiny_any_subset/prepare.py BOOKS_FOLDER WORK_FOLDER [--stories SHARE]
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pyquiet.zoo import held_out

sys.path.insert(0, str(Path(__file__).parent.parent / "tiny_causal"))
sys.path.insert(0, str(Path(__file__).parent.parent / "story_world"))
from corpus import PARAGRAPH_BREAK, Section, read_books
from texts import Use
from world import Wishes, draw_story, text_of

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


def book_texts(sections: list[Section], seed: int, between: Sequence[float]) -> list[str]:
    lengths = random.Random(seed)
    return [text for section in sections for text in documents(section, lengths, between)]


def story_texts(characters: float) -> list[str]:
    """Stories of all kinds, of some so many characters together, without those that come with the package."""
    kept_apart = {row["text"] for row in held_out("stories")}
    rng = np.random.default_rng((0, Use.TRAINING))
    found: list[str] = []
    while characters > 0:
        text = text_of(draw_story(rng, Wishes()))
        if text not in kept_apart:
            found.append(text)
            characters -= len(text)
    return found


def write(texts: list[str], file: Path) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    print(f"{file}: {len(texts)} documents, {sum(map(len, texts))} characters")


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be in [0, 1)")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("books", type=Path, help="folder of the books, one .txt file each")
    parser.add_argument("work", type=Path, help="folder for train.jsonl and held_out.jsonl")
    what = "characters at which a document ends with the sentence that reaches them"
    parser.add_argument("--lengths", nargs=2, type=float, default=LENGTHS, metavar=("LOW", "HIGH"), help=what)
    parser.add_argument("--stories", type=share, default=0.0, metavar="SHARE", help="of the characters to train on")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    books = read_books(args.books)
    train = book_texts([section for book in books for section in book.train], 0, args.lengths)
    train += story_texts(sum(map(len, train)) * args.stories / (1 - args.stories))
    write(train, args.work / "train.jsonl")
    kept = book_texts([section for book in books for section in book.held_out], 1, args.lengths)
    write(kept, args.work / "held_out.jsonl")


if __name__ == "__main__":
    main()
