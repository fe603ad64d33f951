"""Text to tokens: a byte-level BPE tokenizer of 2048 tokens, and token streams to crop from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from corpus import PARAGRAPH_BREAK, Book, Section
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pyquiet.files import replacing

VOCABULARY = 2048
SPECIALS = ("<pad>", "<bos>", "<eos>")
PAD, BOS, EOS = range(3)

# As GPT-2 splits, but a run of line breaks is one piece and a digit is one piece.
_PIECES = r"'(?:s|t|re|ve|m|ll|d)(?!\p{L})|\n+| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"


@dataclass(frozen=True)
class TokenStream:
    """Sections one after another, each as <bos> text <eos>."""

    ids: np.ndarray  # uint16 [N]
    paragraph_starts: np.ndarray  # int64 [M], ascending; the first is 1, behind <bos>

    def paragraph_before(self, offset: int) -> int:
        """Where the paragraph that holds `offset` starts (the first one for offset 0)."""
        found = int(np.searchsorted(self.paragraph_starts, offset, side="right"))
        return int(self.paragraph_starts[max(found - 1, 0)])


def load_or_train_tokenizer(file: Path, books: list[Book]) -> Tokenizer:
    """The tokenizer kept in `file`, else one trained on the training part of `books`."""
    if file.exists():
        return Tokenizer.from_file(str(file))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (PARAGRAPH_BREAK.join(section) for book in books for section in book.train)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    with replacing(file) as partial:
        tokenizer.save(str(partial), pretty=False)
    return tokenizer


def encode_sections(tokenizer: Tokenizer, sections: list[Section]) -> TokenStream:
    """The stream of `sections`; a paragraph is tokenised together with the break behind it."""
    ids: list[int] = []
    starts: list[int] = []
    for section in sections:
        ids.append(BOS)
        pieces = [paragraph + PARAGRAPH_BREAK for paragraph in section[:-1]] + [section[-1]]
        for encoding in tokenizer.encode_batch(pieces, add_special_tokens=False):
            starts.append(len(ids))
            ids.extend(encoding.ids)
        ids.append(EOS)
    return TokenStream(np.asarray(ids, dtype=np.uint16), np.asarray(starts, dtype=np.int64))
