"""Texts with gaps: how they are written, tokenised and told apart again, code among them.

Code of the released any-subset models (arXiv 2504.20456) writes its white space by tokens of XLNet's that have no use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pyquiet.tokens import opening_ids, token_ids

State = TypeVar("State")
# All underscores behind a length close its gap, but where others of them open the next one, of a length too.
_GAP = re.compile(r"\\([\\_])|_{3,}(?:(\d[\d-]*)(?:___(?=_{3,}\d[\d-]*___)|_{3,}))?")
_WORD = "\u2581"  # with which SentencePiece begins one
# In the order in which they are replaced: three spaces are two and one when their turn comes, as in the release.
_WHITE_SPACE = {"\n": "cls_token", "\t": "sep_token", "  ": "unk_token", "   ": "pad_token"}


@dataclass(frozen=True)
class Gapped:
    """A text of token ids: pieces[0], gap 0, pieces[1], ...; a gap's length is one of a range."""

    pieces: list[list[int]]
    lengths: list[range]

    def given(self, lengths: Sequence[int]) -> Tensor:
        """Which tokens the text gives where its gaps have these lengths, bool [N]."""
        first, *rest = self.pieces
        runs = [torch.ones(len(first))]
        for length, piece in zip(lengths, rest, strict=True):
            runs += [torch.zeros(length), torch.ones(len(piece))]
        return torch.cat(runs).bool()

    def tokens(self, lengths: Sequence[int], fill: int = 0) -> Tensor:
        """The text's tokens, and `fill` in its gaps, int64 [N]."""
        given = self.given(lengths)
        ids = torch.tensor([*chain(*self.pieces)], dtype=torch.int64)
        return torch.full((len(given),), fill, dtype=torch.int64).masked_scatter_(given, ids)


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
        raise ValueError(f"text={text!r} has no gap; write ___, or ___3___ for 3 tokens, where something is missing")
    return parts, lengths


def read_length(words: str, name: str = "a gap's length") -> range:
    """The lengths that "3" or "2-5" says; ValueError, which begins with the name, for anything else."""
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", words)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"{name} must be a number of tokens, 3, or a range, 2-5, from 1 on, got {words!r}")
    return range(first, last + 1)


class Codec:
    """Ids of texts with gaps, and their texts; `code` writes white space as `encode_code` does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, code: bool = False) -> None:
        self.tokenizer, self.code = tokenizer, code

    def gapped(
        self, parts: Sequence[str], lengths: Sequence[range], *, trim: bool = False, close: bool = False
    ) -> Gapped:
        """The text of these parts around gaps, behind what the tokenizer opens a text with (BOS, for some).

        With `trim`, spaces before a gap are left to the gap where words carry theirs, as the model knows them. With
        `close`, what the tokenizer ends a text with stands behind it (BERT's [SEP]).
        """
        if trim and len(self.encode("a b")) == 2:
            parts = [*(part.rstrip(" ") for part in parts[:-1]), parts[-1]]
        opening = opening_ids(self.tokenizer)
        closing = self.tokenizer("a")["input_ids"][len(opening) + len(self.encode("a")) :] if close else []
        first, *rest = parts
        pieces = [opening + self.encode(first), *map(self.behind, rest)]
        return Gapped([*pieces[:-1], pieces[-1] + closing], list(lengths))

    def encode(self, text: str) -> list[int]:
        """Ids of a text alone, nothing put before or behind it."""
        if self.code:
            return encode_code(self.tokenizer, text)
        return token_ids(self.tokenizer, text)

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

    def parts(self, ids: Sequence[int], given: Sequence[bool]) -> list[tuple[str, bool]]:
        """The text of ids in parts, and of each whether it was filled in."""
        return [(part, not is_given) for part, is_given, _ in self.runs(ids, given) if part]

    def runs(self, ids: Sequence[int], states: Sequence[State]) -> list[tuple[str, State, int]]:
        """The text of ids in parts, one for each run of the same state, with that state and how many tokens it has."""
        text, runs, begin = self.decode(ids), [], 0
        for state, run in groupby(range(len(ids)), states.__getitem__):
            places = list(run)
            until = self.decode(ids[: places[-1] + 1])
            # A character may end behind the cut; the text before it then ends otherwise.
            stop = next((i for i, (x, y) in enumerate(zip(until, text, strict=False)) if x != y), len(until))
            runs.append((text[begin:stop], state, len(places)))
            begin = stop
        return runs


def drops_white_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether newlines are lost on this tokenizer, as on XLNet's, so that code goes through `encode_code`."""
    return "\n" not in tokenizer.decode(token_ids(tokenizer, "a\nb"))


def encode_code(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of code whose newlines, tabs and pairs of spaces are written <cls>, <sep> and <unk>, as in the release.

    Raises:
        ValueError: the tokenizer lacks one of these tokens.
    """
    for space, name in _WHITE_SPACE.items():
        if getattr(tokenizer, name) is None:
            raise ValueError(
                f"code must have a tokenizer with {name}, by which its white space is written, as XLNet's has it"
            )
        text = text.replace(space, getattr(tokenizer, name))
    return token_ids(tokenizer, text)


def decode_code(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The code that ids say; <pad> is three spaces.

    Behind one of the four tokens XLNet's tokenizer begins a word whether the text has a space there or not: none is
    read. So an odd number of spaces at the beginning of a line comes back as one less.
    """
    spaces = {getattr(tokenizer, f"{name}_id"): space for space, name in _WHITE_SPACE.items()}
    text, opens = "", True
    for token, piece in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        written = spaces.get(token) or piece.replace("\u2581", " ")
        text += written[1:] if opens and token not in spaces and written[0] == " " else written
        opens = token in spaces
    return text
