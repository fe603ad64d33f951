"""Write the books that the base never saw as text files, a section a file: to train on, and held out.

python recipes/tiny_thinker/prepare.py BOOKS_FOLDER WORK_FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tiny_causal"))
from corpus import PARAGRAPH_BREAK, Section, read_books

UNSEEN = ("austen-persuasion", "baum-oz", "chesterton-brown", "dickens-twist", "grimm")


def write(sections: list[Section], folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, section in enumerate(sections):
        (folder / f"{name}-{number:03d}.txt").write_text(PARAGRAPH_BREAK.join(section), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("books", type=Path, help="folder of the books, one .txt file each")
    parser.add_argument("work", type=Path, help="folder for train/ and held_out/")
    args = parser.parse_args()
    for book in read_books(args.books):
        if book.name in UNSEEN:
            write(book.train, args.work / "train", book.name)
            write(book.held_out, args.work / "held_out", book.name)
        else:
            write(book.held_out, args.work / "held_out_of_the_base", book.name)


if __name__ == "__main__":
    main()
