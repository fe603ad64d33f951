"""A language of some words and a model of it that is a table: the same ids have the same log-probs, at no cost."""

from __future__ import annotations

import random
import re
import zlib
from array import array
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from pyquiet.scaling.backends.base import Encoded

EOS, BOS = 0, 1
CHARACTERS = [chr(i) for i in range(32, 127)] + ["\n", "é"]
VERBS = [" so", " then", " add", " take", " from", " we", " have", " left", " gives", " is", " plus", " and", ".\n"]
ANSWERS = [f"\\boxed{{{i}}}" for i in range(10)]
WORDS = ["</s>", "<s>", *CHARACTERS, *VERBS, *ANSWERS]
NUMBERS = {word: i for i, word in enumerate(WORDS)}
LAWS, CONTEXT = 128, 6


class ToyCodec:
    """Reads the longest word first; what is no character of the language is read as "?"."""

    fingerprint, size = "toy", len(WORDS)
    has_template = True
    _pattern = re.compile("|".join(map(re.escape, sorted(WORDS, key=len, reverse=True))) + "|.", re.DOTALL)

    def __init__(self, opening: tuple[int, ...] = ()) -> None:
        self.opening = opening

    def render(self, question: str, system: str | None) -> str:
        return f"{system or ''}Q: {question}\nA:"

    def encode(self, text: str) -> Encoded:
        found = list(self._pattern.finditer(text))
        return Encoded(tuple(NUMBERS.get(m.group(), NUMBERS["?"]) for m in found), tuple(m.span() for m in found))

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(WORDS[i] for i in ids if i > BOS)


class ToyModel:
    """The law of the next token depends on the last few ids. `salt` makes another, similar model of it."""

    def __init__(self, salt: int = 0) -> None:
        shared, own = np.random.default_rng(0), np.random.default_rng(1 + salt)
        logits = shared.normal(size=(LAWS, len(WORDS))) + own.normal(size=(LAWS, len(WORDS)))
        logits[:, NUMBERS[VERBS[0]] :] += 4.0
        logits[:, NUMBERS[ANSWERS[0]] :] -= 2.5
        logits[:, BOS] -= 20.0
        logits[:, EOS] += 1.0
        self.log_probs: list[list[float]] = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).tolist()

    @cached_property
    def _cumulative(self) -> list[list[float]]:
        return [np.exp(law).cumsum().tolist() for law in self.log_probs]

    def law(self, ids: Sequence[int]) -> list[float]:
        """Log-probs of the token behind ids."""
        return self.log_probs[self._number(ids)]

    def score(self, ids: Sequence[int]) -> list[float]:
        """Log-probs of all tokens but the first."""
        return [self.law(ids[:i])[ids[i]] for i in range(1, len(ids))]

    def write(self, ids: Sequence[int], tokens: int, seed: int, temperature: float = 1.0) -> list[int]:
        """Tokens drawn by the seed (at temperature 1, or the likeliest at 0), EOS among them if it comes."""
        dice, new, context = random.Random(seed), [], list(ids[-CONTEXT:])
        while len(new) < tokens and (not new or new[-1] != EOS):
            number = self._number(context)
            weights = self._cumulative[number]
            likeliest = max(range(len(WORDS)), key=self.log_probs[number].__getitem__) if not temperature else None
            drawn = dice.choices(range(len(WORDS)), cum_weights=weights)[0]
            new.append(drawn if likeliest is None else likeliest)
            context.append(new[-1])
        return new

    def _number(self, ids: Sequence[int]) -> int:
        return zlib.crc32(array("i", ids[-CONTEXT:]).tobytes()) % LAWS
