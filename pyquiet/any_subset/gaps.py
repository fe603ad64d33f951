"""Texts with gaps: how they are written, tokenised, filled and told apart again."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby, product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from pyquiet.any_subset.conversion import decode_code, encode_code
from pyquiet.any_subset.engine import as_engine
from pyquiet.any_subset.likelihood import joint_log_prob
from pyquiet.any_subset.sampling import infill
from pyquiet.randomness import Purpose, Stream, draw, resolve_seed

MOST_LENGTHS = 64  # combinations of lengths that a text's gaps may have
_GAP = re.compile(r"\\([\\_])|_{3,}(?:(\d[\d-]*)_{3,})?")
KINDS = ("target", "draft", "auxiliary")  # of calls
Cost = dict[str, float]  # what fillings took: tokens, rounds, target_calls .., seconds
_WORD = "\u2581"  # with which SentencePiece begins one


@dataclass(frozen=True)
class Gapped:
    """A text of token ids: pieces[0], gap 0, pieces[1], ...; a gap's length is one of a range."""

    pieces: list[list[int]]
    lengths: list[range]


@dataclass(frozen=True)
class Filled:
    """A filled text: ids, which of them were given, its gaps' lengths, and log p of the others, processing included."""

    ids: list[int]
    given: list[bool]
    lengths: tuple[int, ...]
    log_prob: float


def parse_gaps(text: str, default: range) -> tuple[list[str], list[range]]:
    r"""The parts of a text around its gaps, one more than those, and the lengths that each gap may have, in tokens.

    A gap is written ___ (`default`), ___3___ or ___2-5___, with three underscores or more. Two are no gap; \_ is an
    underscore and \\ a backslash.

    Raises:
        ValueError: there is no gap, or one has no such length.
    """
    parts, lengths, end = [""], [], 0
    for found in _GAP.finditer(text):
        parts[-1] += text[end : found.start()] + (found[1] or "")
        end = found.end()
        if not found[1]:
            lengths.append(read_length(found[2]) if found[2] else default)
            parts.append("")
    parts[-1] += text[end:]
    if not lengths:
        raise ValueError(f"text has no gap: {text!r}; write ___, or ___3___ for 3 tokens, where something is missing")
    return parts, lengths


def read_length(words: str) -> range:
    """The lengths that "3" or "2-5" names; ValueError for anything else."""
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", words)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"a gap's length must be a number of tokens, 3, or a range, 2-5, from 1 on, got {words!r}")
    return range(first, last + 1)


class Codec:
    """Ids of texts with gaps, and their texts; `code` writes white space as `encode_code` does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, code: bool = False) -> None:
        self.tokenizer, self.code = tokenizer, code

    def gapped(self, parts: Sequence[str], lengths: Sequence[range], *, trim: bool = False) -> Gapped:
        """The text of these parts around gaps, behind what the tokenizer opens a text with (BOS, for some).

        With `trim`, spaces before a gap are left to the gap where words carry theirs, as the model knows them.
        """
        if trim and len(self.encode("a b")) == 2:
            parts = [*(part.rstrip(" ") for part in parts[:-1]), parts[-1]]
        whole, text = list(self.tokenizer("a")["input_ids"]), self.encode("a")
        opening = whole[: whole.index(text[0])] if text and text[0] in whole else []
        first, *rest = parts
        return Gapped([opening + self.encode(first), *map(self.behind, rest)], list(lengths))

    def encode(self, text: str) -> list[int]:
        """Ids of a text alone, nothing put before or behind it."""
        if self.code:
            return encode_code(self.tokenizer, text)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def behind(self, text: str) -> list[int]:
        """Ids of a text right behind something: its first piece begins a word only where a space does."""
        ids = self.encode(text)
        if self.code or not ids or not self.tokenizer.convert_ids_to_tokens(ids[0]).startswith(_WORD):
            return ids
        for before in (".", "a", "1"):
            head, whole = self.encode(before), self.encode(before + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens are left out."""
        if self.code:
            return decode_code(self.tokenizer, ids)
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def banned(self, vocab_size: int) -> Tensor:
        """What a filling of text may not hold, bool [V]: special tokens, but for code's white space, and no tokens."""
        special = set(self.tokenizer.all_special_ids)
        if self.code:
            special -= {*encode_code(self.tokenizer, "\n\t  "), self.tokenizer.pad_token_id}
        banned = torch.arange(vocab_size) >= len(self.tokenizer)
        banned[[token for token in special if token < vocab_size]] = True
        return banned

    def parts(self, filled: Filled) -> list[tuple[str, bool]]:
        """The text in parts, and of each whether it was filled in."""
        text, parts, begin = self.decode(filled.ids), [], 0
        for given, run in groupby(range(len(filled.ids)), filled.given.__getitem__):
            until = self.decode(filled.ids[: max(run) + 1])
            # A character may end behind the cut; the text before it then ends otherwise.
            stop = next((i for i, (x, y) in enumerate(zip(until, text, strict=False)) if x != y), len(until))
            parts.append((text[begin:stop], not given))
            begin = stop
        return [(part, is_filled) for part, is_filled in parts if part]


@torch.no_grad()
def fill_gaps(
    model: Any,
    texts: Sequence[Gapped],
    *,
    seed: int | None = None,
    sequence_ids: Sequence[int] | None = None,
    temperature: float = 1.0,
    **options: Any,
) -> tuple[list[Filled], Cost]:
    """The texts filled by `infill` in one batch, and what that took.

    Where gaps may have several lengths, each combination is filled, and one is drawn by its probability given the text,
    all being equally probable before. With x the text before the first gap, y the rest and g a filling, that is in
    proportion to p(y | x) = p(g, y | x) / p(g | x, y), two joint probabilities of the model: without bias for a g that
    is drawn at temperature 1, exact where the model's orders agree. Where nothing follows the gap, nothing tells its
    length. At temperature 0 the most probable combination is taken.

    Args:
        sequence_ids: name the noise of each text; None is its number.
        options: those of `infill`.

    Returns:
        The texts; and tokens, rounds, target_calls, draft_calls, auxiliary_calls and seconds of all lengths tried.

    Raises:
        ValueError: as `infill`; more than 64 combinations of lengths, or more tokens than fit into memory.
    """
    seed, engine = resolve_seed(seed), as_engine(model)
    ids = list(range(len(texts)) if sequence_ids is None else sequence_ids)
    if (most := max(prod(map(len, text.lengths)) for text in texts)) > MOST_LENGTHS:
        raise ValueError(f"the gaps have {most} combinations of lengths; give ranges of {MOST_LENGTHS} at most")
    choices = [list(product(*text.lengths)) for text in texts]
    _check_memory(model, texts, sum(map(len, choices)), engine.device)
    rows = [(text, lengths) for text, several in zip(texts, choices, strict=True) for lengths in several]
    known = [_given(text, lengths) for text, lengths in rows]
    batch = (
        pad_sequence([_tokens(text, given) for (text, _), given in zip(rows, known, strict=True)], True),
        pad_sequence(known, True, True),
        pad_sequence([torch.ones_like(given) for given in known], True),
    )
    tokens, given, real = (x.to(engine.device) for x in batch)
    noise = torch.tensor(
        [i * len(several) + j for i, several in zip(ids, choices, strict=True) for j in range(len(several))]
    )
    settings = {"seed": seed, "sequence_ids": noise, "temperature": temperature, **options}
    out = infill(engine, tokens, mask=~given, attention_mask=real, **settings)
    weights = torch.zeros(len(rows))
    counts = (~given, out.rounds, out.calls["density"], out.calls["draft"], out.drafter_calls)
    took: Cost = dict(zip(("tokens", "rounds", *(f"{kind}_calls" for kind in KINDS)), map(_total, counts), strict=True))
    took["seconds"] = out.seconds
    if len(rows) > len(texts):
        ends = torch.tensor([len(text.pieces[0]) for text, _ in rows], device=engine.device)
        before = torch.arange(tokens.shape[1], device=engine.device) < ends[:, None]
        both = [joint_log_prob(engine, out.tokens, known=x, attention_mask=real) for x in (before, given)]
        weights = (both[0] - both[1]).cpu()
        took["target_calls"] += 2 * len(rows)
    filled, start = [], 0
    for i, several in zip(ids, choices, strict=True):
        choice = Stream(seed, Purpose.RESAMPLE, i)
        laws = weights[None, start : start + len(several)]
        best = int(draw(laws, stream=choice, temperature=float(temperature > 0)).tokens)
        row, start = start + best, start + len(several)
        log_prob = float(out.log_probs[row].sum())
        filled.append(Filled(out.tokens[row, real[row]].tolist(), known[row].tolist(), several[best], log_prob))
    return filled, took


def _total(counts: Tensor) -> int:
    return int(counts.sum())


def _given(text: Gapped, lengths: Sequence[int]) -> Tensor:
    """bool [N]"""
    first, *rest = text.pieces
    runs = [torch.ones(len(first))]
    for length, piece in zip(lengths, rest, strict=True):
        runs += [torch.zeros(length), torch.ones(len(piece))]
    return torch.cat(runs).bool()


def _tokens(text: Gapped, given: Tensor) -> Tensor:
    return torch.zeros(len(given), dtype=torch.int64).masked_scatter_(
        given, torch.tensor([*chain(*text.pieces)], dtype=torch.int64)
    )


def _check_memory(model: Any, texts: Sequence[Gapped], rows: int, device: torch.device) -> None:
    """Refuses what cannot end well: of an XLNet, the cache and the scores of what is computed at once are counted."""
    config = getattr(model, "config", None)
    if config is None:
        return
    given = max(sum(map(len, text.pieces)) for text in texts)
    length = max(sum(map(len, text.pieces)) + sum(gap[-1] for gap in text.lengths) for text in texts)
    at_once = given if rows == len(texts) else length
    needed = 4 * rows * (3 * config.n_head * at_once**2 + 2 * config.n_layer * config.d_model * length)
    there = _memory(device)
    if needed > there:
        raise ValueError(
            f"text: {rows} rows of up to {length} tokens need {needed / 2**30:.1f} GiB or more, of {there / 2**30:.1f} "
            "GiB of memory; give shorter texts or gaps, narrower ranges of lengths or fewer at a time"
        )


def _memory(device: torch.device) -> int:
    """Bytes that may be used on the device, at most."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
