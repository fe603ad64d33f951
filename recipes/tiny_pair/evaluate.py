"""How often a model solves held-out problems alone, where it errs, and how its scores tell wrong lines from right ones.

    python recipes/tiny_pair/evaluate.py DRAFT_FOLDER TARGET_FOLDER [--problems N]

Answers are compared as numbers in the last box. A line is right where the solution's line
in its place is the same; lines behind the first wrong one are not judged.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from problems import Problem
from texts import held_out, padded
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyquiet.bilevel.demonstration import auc
from pyquiet.datasets import IGNORED

BATCH = 50
NEW_TOKENS = 200
TABLE_HEAD = """| model | way | right | 3 steps | 4 | 5 | 6 | lines wrong | of these false equations |
|---|---|---|---|---|---|---|---|---|"""
_BOX = re.compile(r"\\boxed\{(\d+)\}")
_EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@torch.inference_mode()
def solutions(model: Any, tokenizer: Any, problems: Sequence[Problem], temperature: float, **options: Any) -> list[str]:
    """What the model writes behind each question, `options` being generate's; greedy at temperature 0."""
    tokenizer.padding_side = "left"
    torch.manual_seed(0)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    found: list[str] = []
    for start in range(0, len(problems), BATCH):
        prompts = [problem.question + "\n" for problem in problems[start : start + BATCH]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, **how, **options)
        found += tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return found


def is_right(problem: Problem, solution: str) -> bool:
    """The last box holds the answer."""
    boxes = _BOX.findall(solution)
    return bool(boxes) and int(boxes[-1]) == problem.answer


def judged_lines(problem: Problem, solution: str) -> Iterator[tuple[str, str, bool]]:
    """(text before it, line, is it right) of the lines up to the first wrong one."""
    before = ""
    for line, true in zip(solution.splitlines(keepends=True), problem.lines, strict=False):
        right = line == true
        yield before, line, right
        if not right:
            return
        before += line


def reckoned_wrong(line: str) -> bool:
    """The line holds an equation that is false."""
    match = _EQUATION.search(line)
    if match is None:
        return False
    left, sign, right, result = match.groups()
    true = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}
    return int(result) != true[sign] if sign != "/" else int(result) * int(right) != int(left)


@torch.inference_mode()
def line_nlls(model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[float]:
    """Mean NLL in nats of the second part of each text behind the first."""
    found: list[float] = []
    for start in range(0, len(texts), BATCH):
        rows = []
        for before, line in texts[start : start + BATCH]:
            given, scored = tokenizer(before).input_ids, tokenizer(line, add_special_tokens=False).input_ids
            rows.append({"input_ids": given + scored, "labels": [IGNORED] * len(given) + scored})
        batch = padded(rows)
        logits = model(batch["input_ids"]).logits[:, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits.mT, batch["labels"][:, 1:], reduction="none")
        found += (nll.sum(1) / (batch["labels"][:, 1:] != IGNORED).sum(1)).tolist()
    return found


def area_under_curve(wrong: Sequence[float], right: Sequence[float]) -> float:
    """P(a wrong line's score is above a right line's), ties counting half."""
    return auc(torch.tensor([*wrong, *right]), torch.arange(len(wrong) + len(right)) < len(wrong))


def accuracy_row(name: str, way: str, problems: Sequence[Problem], written: Sequence[str]) -> str:
    right = defaultdict(list)
    for problem, solution in zip(problems, written, strict=True):
        right[len(problem.steps)].append(is_right(problem, solution))
    judged = [row for pair in zip(problems, written, strict=True) for row in judged_lines(*pair)]
    wrong = [line for _, line, good in judged if not good]
    cells = [
        _share([good for group in right.values() for good in group]),
        *(_share(right[steps]) for steps in sorted(right)),
    ]
    cells += [f"{len(wrong) / len(judged):.1%}", f"{sum(map(reckoned_wrong, wrong)) / max(1, len(wrong)):.0%}"]
    return f"| {name} | {way} | {' | '.join(cells)} |"


def _share(right: Sequence[bool]) -> str:
    return f"{sum(right) / len(right):.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("draft", type=Path, help="folder of the draft")
    parser.add_argument("target", type=Path, help="folder of the target")
    parser.add_argument("--problems", type=int, default=1000, help="how many of the 1000 held-out problems")
    args = parser.parse_args()
    torch.set_num_threads(1)
    problems = held_out("evaluation")[: args.problems]
    print(TABLE_HEAD)
    drafted: list[str] = []
    for name, folder in (("draft", args.draft), ("target", args.target)):
        model, tokenizer = load(folder)
        for way, temperature in (("greedy", 0.0), ("temperature 0.8", 0.8)):
            written = solutions(model, tokenizer, problems, temperature)
            print(accuracy_row(name, way, problems, written), flush=True)
            drafted = written if (name, temperature) == ("draft", 0.8) else drafted
    print(separation(model, tokenizer, problems, drafted))


def separation(target: Any, tokenizer: Any, problems: Sequence[Problem], drafted: Sequence[str]) -> str:
    """What the target thinks of a draft's right and wrong lines."""
    lines: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for problem, solution in zip(problems, drafted, strict=True):
        for before, line, right in judged_lines(problem, solution):
            lines[right].append((problem.question + "\n" + before, line))
    nlls = {right: line_nlls(target, tokenizer, lines[right]) for right in lines}
    behind = {right: [(before + line, "Wait") for before, line in lines[right]] for right in lines}
    tokens = len(tokenizer("Wait", add_special_tokens=False).input_ids)
    wait = {
        right: fmean(math.exp(-tokens * nll) for nll in line_nlls(target, tokenizer, behind[right])) for right in lines
    }
    return (
        f"\nMean NLL of the draft's lines under the target: {len(nlls[True])} right {fmean(nlls[True]):.3f}, "
        f"{len(nlls[False])} wrong {fmean(nlls[False]):.3f}; AUC {area_under_curve(nlls[False], nlls[True]):.3f}\n"
        f"P(the target says Wait) behind right lines {wait[True]:.4f}, behind wrong ones {wait[False]:.3f}"
    )


def load(folder: Path) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    main()
