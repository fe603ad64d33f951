"""Documents on their way to the trainer: pieces, and ends of text."""

from __future__ import annotations

import pytest

from pyquiet import load
from pyquiet.quiet_star.data import overlapping_pieces, tokenize


@pytest.mark.parametrize("length", [1, 2, 9, 10, 19, 20, 21, 57])
def test_pieces_cover_the_document(length):
    """At whatever places the crops fall, one a piece, an epoch has about all of it, and every token can be met."""
    pieces = overlapping_pieces(list(range(length)), 10)
    assert len(pieces) == max(1, length // 10)
    assert {token for piece in pieces for token in piece} == set(range(length))
    assert all(len(piece) >= min(length, 10) and len(piece) < 20 for piece in pieces)


def test_documents_end_with_the_end_of_text():
    _, tokenizer = load("tiny-causal")
    examples = tokenize(["Once upon a time", "x" * 400], tokenizer, 50)
    assert examples[0]["input_ids"][-1] == tokenizer.eos_token_id
    assert examples[0]["input_ids"].count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(examples[0]["input_ids"][:-1]).endswith("upon a time")
    assert len(examples) > 2
    with pytest.raises(ValueError, match="no two tokens"):
        tokenize([], tokenizer, 50)
    for nothing in ("", " \n", None):
        with pytest.raises(ValueError, match="text 1 is empty"):
            tokenize(["words", nothing], tokenizer, 50)
