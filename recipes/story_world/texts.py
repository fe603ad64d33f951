"""Stories as tokens: rows to train on, and held-out stories whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor
from world import Part, Story, Wishes, draw_story

Encode = Callable[[str], list[int]]
BOS, EOS = 1, 2


class Use(IntEnum):
    """What stories are drawn for; each has random numbers of its own."""

    TRAINING = 0
    THINKING = 1
    EVALUATION = 2


@dataclass(frozen=True)
class Encoded:
    """A story as <bos> text <eos>."""

    ids: list[int]
    parts: list[Part | None]  # of each token; of an answer, its first token alone is ANSWER
    depths: list[int]  # steps to the answer, at its first token; else 0


def encode_story(story: Story, encode: Encode) -> Encoded:
    ids, parts, depths = [BOS], [None], [0]
    for piece in story:
        new = encode(piece.text)
        ids += new
        first, rest = (piece.part, Part.QUESTION) if piece.part is Part.ANSWER else (piece.part, piece.part)
        parts += [first] + [rest] * (len(new) - 1)
        depths += [piece.depth] + [0] * (len(new) - 1)
    return Encoded([*ids, EOS], [*parts, None], [*depths, 0])


def story_rows(seed: int, step: int, rows: int, length: int, encode: Encode) -> Tensor:
    """int64 [rows, length]: stories one after another, the last of a row cut; drawn from (seed, step) alone."""
    rng = np.random.default_rng((seed, Use.TRAINING, step))
    batch = []
    for _ in range(rows):
        ids: list[int] = []
        while len(ids) < length:
            ids += encode_story(draw_story(rng, Wishes()), encode).ids
        batch.append(ids[:length])
    return torch.tensor(batch)
