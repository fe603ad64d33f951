"""Mix documents of books with stories, for trainers that read JSONL.

python recipes/story_world/documents.py BOOKS.jsonl MIXED.jsonl --stories N [--held-out]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from texts import Use
from world import Wishes, draw_story, text_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("books", type=Path, help="as `recipes/tiny_any_subset/prepare.py` writes it")
    parser.add_argument("mixed", type=Path, help="file to write")
    parser.add_argument("--stories", type=int, required=True, help="how many")
    parser.add_argument("--held-out", action="store_true", help="stories of which training has none")
    args = parser.parse_args()
    rng = np.random.default_rng((2, Use.EVALUATION if args.held_out else Use.TRAINING))
    stories = [{"text": text_of(draw_story(rng, Wishes()))} for _ in range(args.stories)]
    rows = [json.loads(line) for line in args.books.read_text(encoding="utf-8").splitlines()] + stories
    random.Random(0).shuffle(rows)
    args.mixed.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{args.mixed}: {len(rows)} documents, {len(stories)} of them stories")


if __name__ == "__main__":
    main()
