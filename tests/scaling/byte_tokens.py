"""Tokenizers made in place, for tests of scaling: bytes, and bytes with some merges."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS = "<s>", "</s>"


def byte_tokenizer(
    merges: Sequence[tuple[str, str]] = (), *, bos: bool = False, template: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with these merges; ids 0 and 1 are BOS and EOS, and `bos` puts BOS before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [BOS, EOS, *alphabet, *("".join(pair) for pair in merges)]
    fast = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges)))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    if bos:
        fast.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    fast.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=BOS, eos_token=EOS, chat_template=template)


def spaced_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Words in the manner of SentencePiece: spaces belong to what follows, the first is lost; bytes for the rest."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *(f"▁{w}" for w in words), "▁"]
    scores = [(p, -20.0 if p.startswith("<") else -1.0) for p in pieces]
    fast = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>")
