"""Documents as pieces for a trainer of thinking models."""

from collections.abc import Iterable, Sequence
from typing import Any

from pyquiet.datasets import documents


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
