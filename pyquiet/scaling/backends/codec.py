"""A transformers tokenizer as chains need it: ids with the characters they stand for, and text that is whole."""

import copy
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from pyquiet.scaling.backends.base import Encoded, TextCodec
from pyquiet.tokens import opening_ids

_NO_CHARACTER = "\ufffd"  # what decoders write for bytes that are no character
_CONTEXT = 16  # tokens before new ones that settle how these are spelled, such as a space in front
_NO_PART_OF_TEXT = ("truncation", "padding", "post_processor")  # of tokenizer.json


class HFCodec:
    """The `TextCodec` of a fast transformers tokenizer. It works on a copy, and may be used by several threads.

    Raises TypeError for a tokenizer without the `tokenizers` library behind it, which cannot tell offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        fast = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(fast, Tokenizer):
            raise TypeError(
                f"tokenizer must be a fast one (it has to say which characters a token stands for), got "
                f"{type(tokenizer).__name__}; load it with AutoTokenizer, or convert it to a tokenizer.json and read "
                "that with PreTrainedTokenizerFast"
            )
        self._tokenizer = tokenizer
        self._fast = copy.deepcopy(fast)
        self._fast.no_truncation()
        self._fast.no_padding()

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides over ids and text: vocabulary, merges, added tokens, how text is cut and joined."""
        parts = {k: v for k, v in json.loads(self._fast.to_str()).items() if k not in _NO_PART_OF_TEXT}
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    @cached_property
    def size(self) -> int:
        """What all ids are below."""
        return 1 + max(self._fast.get_vocab().values())

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """Ids that the tokenizer puts before a text: BOS for most, for some none."""
        return tuple(opening_ids(self._tokenizer))

    @property
    def has_template(self) -> bool:
        """Whether the tokenizer came with a chat template."""
        return getattr(self._tokenizer, "chat_template", None) is not None

    def render(self, question: str, system: str | None) -> str:
        """The question as its chat template shows it, the answer about to begin.

        Raises what the template raises, such as for a system message where it knows none.
        """
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": question})
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def encode(self, text: str) -> Encoded:
        """Ids of the text and the characters [begin, end) of each; nothing is put before or behind."""
        encoding = self._fast.encode(text, add_special_tokens=False)
        return Encoded(tuple(encoding.ids), tuple(encoding.offsets))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out, without the bytes of a last character that is not complete."""
        text = self._spell(ids)
        if not text.endswith(_NO_CHARACTER):
            return text
        # A decoder that falls back to bytes gives up a whole run of them for one that is missing, others that one.
        shorter = (self._spell(ids[:-k]) for k in range(1, min(4, len(ids))))
        whole = [s for s in shorter if not s.endswith(_NO_CHARACTER)]
        return max([text.rstrip(_NO_CHARACTER), *whole], key=len)

    def _spell(self, ids: Sequence[int]) -> str:
        return str(self._fast.decode(list(ids), skip_special_tokens=True))


def decode_after(codec: TextCodec, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add behind the ids `before`.

    Decoded alone it might lack its first space, or a character whose first bytes are the last of `before`.
    """
    context = list(before[-_CONTEXT:])
    known = codec.decode(context)
    whole = codec.decode(context + list(ids))
    return whole[len(known) :] if whole.startswith(known) else codec.decode(ids)
