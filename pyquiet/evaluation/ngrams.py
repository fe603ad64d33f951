"""How close the n-grams of texts are to those of a reference, and how many of them differ.

A text is a sequence of symbols: a str of characters, or a list or tensor [N] of token ids.
"""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pyquiet.checks import check_count
from pyquiet.evaluation.estimates import Estimate

Gram = tuple[Hashable, ...]


def ngram_variation(samples: Sequence[Any], reference: Sequence[Any], n: int) -> Estimate:
    """Total variation between the n-grams of all samples and those of a reference, in [0, 1], and its jackknife error.

    Few samples are far from any law, the right one too: read it beside what as many texts of the reference's own kind
    have, which are no part of it.

    Raises:
        ValueError: no sample, or no text of the reference, has n symbols.
    """
    check_count("n", n, least=1)
    rows, law = (
        [Counter(_grams(text, n)) for text in samples],
        Counter(g for text in reference for g in _grams(text, n)),
    )
    for name, grams in (("samples", sum(row.total() for row in rows)), ("reference", law.total())):
        if not grams:
            raise ValueError(f"{name} hold no text of n={n} symbols; give longer ones, or a smaller n")
    place = {gram: i for i, gram in enumerate({gram for row in rows for gram in row})}
    q = torch.tensor([law[gram] for gram in place], dtype=torch.float64) / law.total()
    where = [torch.tensor([place[gram] for gram in row], dtype=torch.int64) for row in rows]
    own = [torch.tensor([*row.values()], dtype=torch.float64) for row in rows]
    count = torch.zeros_like(q).index_add_(0, torch.cat(where), torch.cat(own))
    total, missed = float(count.sum()), 1 - float(q.sum())  # the reference's mass on n-grams that no sample has

    def distance(left_out: float) -> float:
        return float((count / max(1.0, total - left_out) - q).abs().sum()) + missed

    near = {size: distance(size) for size in {float(x.sum()) for x in own}}
    without = []
    for at, mine in zip(where, own, strict=True):  # only the n-grams of the text that is left out change their terms
        size = float(mine.sum())
        rest = max(1.0, total - size)
        change = ((count[at] - mine) / rest - q[at]).abs() - (count[at] / rest - q[at]).abs()
        without.append((near[size] + float(change.sum())) / 2)
    return Estimate.jackknife(distance(0.0) / 2, torch.tensor(without, dtype=torch.float64))


def distinct_ngrams(texts: Sequence[Any], n: int) -> Tensor:
    """Of each text, the share of its n-grams that differ from one another, float64 [B]; nan where it has none."""
    check_count("n", n, least=1)
    counts = [Counter(_grams(text, n)) for text in texts]
    return torch.tensor([len(c) / c.total() if c else float("nan") for c in counts], dtype=torch.float64)


class NGramModel:
    """The law of a symbol given the n - 1 before it, from the counts of reference texts.

    p(w | h) = (c(hw) + add) / (c(h) + add S), S being the symbols that the texts have and one for all others. The first
    symbols of a text, which have fewer before them, are given these: so a text may begin anywhere.

    Raises:
        ValueError: n < 1, add <= 0, or the reference holds nothing.
    """

    def __init__(self, reference: Sequence[Any], n: int, *, add: float = 0.02) -> None:
        check_count("n", n, least=1)
        if not add > 0:
            raise ValueError(f"add must be above 0, or what the reference lacks has no probability; got {add}")
        self.n, self.add = n, add
        self.counts: Counter[Gram] = Counter(
            gram for text in reference for o in range(n) for gram in _grams(text, o + 1)
        )
        self.histories: Counter[Gram] = Counter()
        for gram, count in self.counts.items():
            self.histories[gram[:-1]] += count
        self.symbols = 1 + sum(len(gram) == 1 for gram in self.counts)
        if not self.counts:
            raise ValueError("reference holds no text; give one")

    def nll(self, texts: Sequence[Any]) -> Tensor:
        """Of each text, -log p of its symbols by this law in nats a symbol, float64 [B]; nan for an empty one.

        What is repetitive has a low one too: read it beside the entropy.
        """
        return torch.stack([self._nll(_symbols(text)).mean() for text in texts])

    def _nll(self, text: Gram) -> Tensor:
        grams = [text[max(0, end - self.n) : end] for end in range(1, len(text) + 1)]
        seen = torch.tensor([(self.counts[gram], self.histories[gram[:-1]]) for gram in grams], dtype=torch.float64)
        joint, history = seen.view(-1, 2).unbind(1)
        return torch.log((history + self.add * self.symbols) / (joint + self.add))


def _symbols(text: Any) -> Gram:
    return tuple(text.tolist() if isinstance(text, Tensor) else text)


def _grams(text: Any, n: int) -> Iterator[Gram]:
    symbols = _symbols(text)
    return zip(*(islice(symbols, i, None) for i in range(n)), strict=False)
