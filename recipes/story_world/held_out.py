"""Write the texts that come with the package: stories and passages of books that no training reads.

python recipes/story_world/held_out.py BOOKS_FOLDER TEXTS_FOLDER
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from texts import Use
from world import KINDS, Wishes, draw_story, text_of

sys.path.insert(0, str(Path(__file__).parent.parent / "tiny_any_subset"))
from prepare import documents, read_books

STORIES = 60  # of each kind
PASSAGES = 240
LENGTHS = (200.0, 400.0)  # characters of a passage


def stories() -> Iterable[dict[str, str]]:
    """Stories whose conclusions are all given at once."""
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng((1, Use.EVALUATION, number))
        for _ in range(STORIES):
            yield {"text": text_of(draw_story(rng, Wishes(shallow=0.25, written=0.0), kind)), "kind": kind}


def passages(books: Path) -> list[dict[str, str]]:
    """Some sentences each, spread evenly over the held-out parts of all books."""
    lengths = random.Random(0)
    found = [
        {"text": text, "kind": book.name}
        for book in read_books(books)
        for section in book.held_out
        for text in documents(section, lengths, LENGTHS)
        if len(text) >= LENGTHS[0]
    ]
    return [found[i * len(found) // PASSAGES] for i in range(PASSAGES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("books", type=Path)
    parser.add_argument("texts", type=Path, help="folder to write")
    args = parser.parse_args()
    args.texts.mkdir(parents=True, exist_ok=True)
    for name, rows in (("stories", stories()), ("passages", passages(args.books))):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (args.texts / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
