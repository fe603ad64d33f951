"""What the trainers of thinking models read: documents in pieces, and which tokens of a batch are to be predicted."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from pyquiet.datasets import IGNORED, documents
from pyquiet.quiet_star.objective import next_token_targets


def overlapping_pieces(ids: Sequence[int], max_length: int) -> list[Sequence[int]]:
    """A document as pieces that start every `max_length` tokens and hold up to twice as many.

    Cropped to max_length, one crop a piece, they cover the document about once an epoch, each time at other places.
    """
    starts = range(0, max(1, len(ids) - max_length + 1), max_length)
    return [ids[start : start + 2 * max_length - 1] for start in starts]


def tokenize(texts: Iterable[str], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """Examples for `QuietStarTrainer`: documents as token ids, each with its end of text, in overlapping pieces.

    Raises:
        ValueError: there is no text, or an empty one.
    """
    examples = [
        {"input_ids": piece}
        for ids in documents(texts, tokenizer)
        for piece in overlapping_pieces(ids, max_length)
        if len(piece) > 1
    ]
    if not examples:
        raise ValueError("the texts hold no two tokens; give longer ones")
    return examples


def targets_in(inputs: dict[str, Any]) -> Tensor:
    """bool [B, T - 1] of a batch: there is a next token, and it is to be predicted."""
    return next_token_targets(inputs["input_ids"], inputs.get("attention_mask"), inputs.get("labels"))


def labels_in(inputs: dict[str, Any]) -> Tensor:
    """int64 [B, T - 1] of a batch: the next token, -100 where none is to be predicted."""
    following: Tensor = inputs["input_ids"][:, 1:]
    return following.masked_fill(~targets_in(inputs), IGNORED)
