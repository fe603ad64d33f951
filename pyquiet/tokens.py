"""Texts as token ids: alone, with what opens them, behind others, and in padded batches."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text alone, nothing put before or behind it, however long it is."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts before a text: BOS for most, for some none."""
    text, full = token_ids(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    starts = (i for i in range(len(full)) if full[i : i + len(text)] == text)
    return full[: next(starts, 0)]


def continuation_ids(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """Ids of `text` as it is written right behind `before`; ValueError where a token spans both."""
    head, whole = token_ids(tokenizer, before), token_ids(tokenizer, before + text)
    if whole[: len(head)] != head:
        raise ValueError(f"tokenizer: {before!r} and {text!r} share a token, so that the text cannot be told apart")
    return whole[len(head) :]


def padded(rows: Sequence[Sequence[int]], side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, int64 [B, T], of rows of ids padded with 0 on that side."""
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.as_tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_side=side
    )
    length = torch.tensor([len(row) for row in rows])
    column = torch.arange(ids.shape[1])
    mask = column < length[:, None] if side == "right" else column >= ids.shape[1] - length[:, None]
    return ids, mask.long()
