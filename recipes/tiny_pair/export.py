"""Write a trained model as a Hugging Face folder with float16 weights; with --questions also held-out problems.

python recipes/tiny_pair/export.py WORK_FOLDER MODEL_FOLDER [--questions]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from texts import held_out
from transformers import AutoModelForCausalLM, AutoTokenizer

SIZE_LIMIT = 5_000_000  # bytes of a folder's model and tokenizer


def export(work: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(work).half()
    model.config.use_cache = True  # which training turned off
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(work).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for the owner alone, but packages are for everyone
    size = sum(file.stat().st_size for file in folder.glob("*") if file.suffix in (".safetensors", ".json"))
    if size > SIZE_LIMIT:
        raise ValueError(f"{folder} takes {size} bytes, more than {SIZE_LIMIT}")
    print(f"{folder}: {size} bytes")


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
    parser.add_argument("work", type=Path, help="work folder of train.py, or one of its checkpoints")
    parser.add_argument("model", type=Path, help="folder to write")
    parser.add_argument("--questions", action="store_true", help="also questions.jsonl and calibration.jsonl")
    args = parser.parse_args()
    export(args.work, args.model)
    if args.questions:
        write_questions(args.model)


if __name__ == "__main__":
    main()
