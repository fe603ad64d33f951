"""An XLNet tokenizer of a few words, which drops white space and puts <sep><cls> behind a text."""

from transformers import XLNetTokenizer

_SPECIAL = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"]
_WORDS = ["\u2581def", "\u2581return", "\u2581The", "\u2581cat", "\u2581sat", "\u2581un", "able", "\u2581="]


def small_xlnet_tokenizer() -> XLNetTokenizer:
    letters = [*"\u2581abcdefghijklmnopqrstuvwxyzT.,():=123"]
    vocabulary = [(s, 0.0) for s in _SPECIAL] + [(w, -2.0) for w in _WORDS] + [(c, -6.0) for c in letters]
    return XLNetTokenizer(vocab=vocabulary)
