"""Write the held-out problems that come with the target: to ask, and to calibrate with.

python recipes/tiny_pair/questions.py MODEL_FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from texts import held_out


def write_questions(folder: Path) -> None:
    """The shipped questions, and more of them to calibrate with."""
    for use in ("questions", "calibration"):
        rows = [
            {"id": f"{use}-{number:03d}", "question": problem.question, "answer": str(problem.answer)}
            for number, problem in enumerate(held_out(use))
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{use}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", type=Path, help="folder to write to")
    write_questions(parser.parse_args().model)


if __name__ == "__main__":
    main()
