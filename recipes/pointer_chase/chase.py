"""The task: texts that give a random permutation f of six symbols, then ask for f(a) or f(f(f(a))).

A text is six pair tokens `a>f(a)` in random order and four queries, each in one of three forms:

    a ?1 f(a)                         one hop
    a ?3 f(f(f(a)))                   three hops, answered at once
    a ?3 --- b c --- f(f(f(a)))       three hops, written out: b c is f(a) f(f(a)) or, with probability 1/2, noise

The mark stands behind its symbol, so that two layers cannot make three hops at once: the first has to fetch the symbol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pyquiet.datasets import IGNORED

SYMBOLS = "abcdef"
QUERIES = 4
WORDS = [f"{a}>{b}" for a in SYMBOLS for b in SYMBOLS] + [*SYMBOLS, "?1", "?3", "---"]
IDS = {word: i for i, word in enumerate(WORDS)}
FIRST_SYMBOL, THINK = IDS[SYMBOLS[0]], IDS["---"]


class Form(Enum):
    """How a query is put."""

    ONE_HOP = "?1"
    DIRECT = "?3"
    WRITTEN = "?3 ---"


class Use(Enum):
    """What texts are drawn for; each has random numbers of its own."""

    PRETRAINING = 0
    ADAPTATION = 1
    EVALUATION = 2


@dataclass(frozen=True)
class Texts:
    """B texts of one length T, whose Q queries have the same forms in the same order."""

    ids: Tensor  # int64 [B, T]
    marks: Tensor  # int64 [Q] columns of ?1 and ?3
    chains: Tensor  # int64 [B, Q, 2] f(a) f(f(a))
    answers: Tensor  # int64 [B, Q] f(f(f(a)))

    @property
    def after_pairs(self) -> Tensor:
        """Labels [B, T]: everything behind the pairs is to be predicted."""
        labels = self.ids.clone()
        labels[:, : len(SYMBOLS)] = IGNORED
        return labels


def draw_texts(rng: np.random.Generator, rows: int, forms: Sequence[Form]) -> Texts:
    """Random texts with queries of these forms."""
    n, queries = len(SYMBOLS), len(forms)
    symbols = np.tile(np.arange(n), (rows, 1))
    f, order = rng.permuted(symbols, axis=1), rng.permuted(symbols, axis=1)
    hops = [rng.integers(n, size=(rows, queries))]
    for _ in range(3):
        hops.append(np.take_along_axis(f, hops[-1], 1))
    chain = np.stack(hops[1:3], 2)
    noisy = rng.random((rows, queries, 1)) < 0.5
    written = np.where(noisy, rng.integers(n, size=chain.shape), chain)

    parts, marks, width = [order * n + np.take_along_axis(f, order, 1)], [], n
    dashes = np.full((rows, 1), THINK)
    for q, form in enumerate(forms):
        query = [FIRST_SYMBOL + hops[0][:, [q]], np.full((rows, 1), IDS[form.value.split()[0]])]
        if form is Form.WRITTEN:
            query += [dashes, FIRST_SYMBOL + written[:, q], dashes]
        query.append(FIRST_SYMBOL + hops[1 if form is Form.ONE_HOP else 3][:, [q]])
        parts += query
        marks.append(width + 1)
        width += sum(part.shape[1] for part in query)
    ids, chain, answers = np.concatenate(parts, 1), FIRST_SYMBOL + chain, FIRST_SYMBOL + hops[3]
    return Texts(torch.from_numpy(ids), torch.tensor(marks), torch.from_numpy(chain), torch.from_numpy(answers))


def mixed_texts(seed: int, step: int, rows: int) -> Texts:
    """A batch to pretrain on: half of the queries are one-hop, a quarter direct, a quarter written out."""
    rng = np.random.default_rng((seed, Use.PRETRAINING.value, step))
    forms = [Form.ONE_HOP, Form.ONE_HOP, Form.DIRECT, Form.WRITTEN]
    return draw_texts(rng, rows, [forms[i] for i in rng.integers(len(forms), size=QUERIES)])


def direct_texts(use: Use, seed: int, step: int, rows: int) -> Texts:
    """A batch whose queries are all three-hop and answered at once."""
    return draw_texts(np.random.default_rng((seed, use.value, step)), rows, [Form.DIRECT] * QUERIES)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word; spaces part words."""
    words = Tokenizer(models.WordLevel(IDS))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False
    )
