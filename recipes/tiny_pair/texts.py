"""Problems as token ids: the tokenizer, held-out problems, and texts to train on."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from errors import Line, with_errors
from problems import Problem
from stories import draw_problem
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

import pyquiet
from pyquiet.datasets import IGNORED

PAD, BOS, EOS = range(3)
CONTEXT = 512
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] | trim }}\n{% endfor %}"
# Seeds of problems that are never trained on, by what they are for, and how many there are.
HELD_OUT = {"questions": (1, 64), "calibration": (2, 128), "evaluation": (3, 1000)}
TRAINING_SEED = 0
ERRORS = (0.7, 0.22, 0.08)  # shares of the texts that hold no, one and two wrong lines


def family_tokenizer() -> PreTrainedTokenizerBase:
    """That of tiny-causal, in which each digit is a token of its own, with a chat template."""
    tokenizer = pyquiet.load("tiny-causal")[1]
    tokenizer.model_max_length = CONTEXT
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def held_out(use: str) -> list[Problem]:
    """The problems of one use, all different and none of them of another use."""
    taken: set[tuple[str, ...]] = set()
    for name, (seed, count) in HELD_OUT.items():
        found = []
        problems = _problems(seed)
        while len(found) < count:
            problem = next(problems)
            if problem.equations not in taken:
                taken.add(problem.equations)
                found.append(problem)
        if name == use:
            return found
    raise ValueError(f"use={use!r} must be one of {', '.join(HELD_OUT)}")


def training_texts(count: int) -> Iterator[tuple[str, list[Line]]]:
    """Questions and solutions, some with corrected errors; no problem is held out, in whatever words."""
    forbidden = {problem.equations for use in HELD_OUT for problem in held_out(use)}
    problems, rng = _problems(TRAINING_SEED), random.Random("errors")
    while count:
        problem = next(problems)
        if problem.equations not in forbidden:
            (errors,) = rng.choices(range(len(ERRORS)), ERRORS)
            yield problem.question + "\n", with_errors(problem, rng, errors)
            count -= 1


def _problems(seed: int) -> Iterator[Problem]:
    rng = random.Random(seed)
    while True:
        yield draw_problem(rng)


class Texts(Dataset[dict[str, list[int]]]):
    """Encoded training texts: <bos> question solution <eos>, where wrong lines have no labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, count: int) -> None:
        ids, learned, ends = [], [], [0]
        for question, lines in training_texts(count):
            parts = tokenizer([question, *(line.text for line in lines)], add_special_tokens=False).input_ids
            row = [BOS, *(i for part in parts for i in part), EOS]
            wrong = [False, *(line.wrong for line in lines)]
            mask = [False, *(not bad for part, bad in zip(parts, wrong, strict=True) for _ in part), True]
            ids.append(np.array(row, np.uint16))
            learned.append(np.array(mask))
            ends.append(ends[-1] + len(row))
        self.ids, self.learned, self.ends = np.concatenate(ids), np.concatenate(learned), ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        place = slice(self.ends[index], self.ends[index + 1])
        ids, learned = self.ids[place].astype(int), self.learned[place]
        return {"input_ids": ids.tolist(), "labels": np.where(learned, ids, IGNORED).tolist()}


def padded(rows: list[dict[str, list[int]]], multiple: int = 16) -> dict[str, Tensor]:
    """Rows of one length, padded at the right, so that a causal model needs no mask."""
    length = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple
    fill = {"input_ids": PAD, "labels": IGNORED}
    return {
        key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])
        for key, value in fill.items()
    }
