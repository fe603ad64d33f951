"""Single tokens as a reader can see them."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
_LONGEST_CHARACTER = 4  # bytes
# Control characters, but tab and newline, as their pictures: HTML has no way to hold some of them.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


def visible(text: str) -> str:
    """The text with control characters, but tab and newline, shown as pictures of them."""
    return text.translate(_PICTURES)


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token of a text adds to it.

    A character that several tokens spell stands with the last; those before it show what they are, in hexadecimal:
    "[E2 80]". So do tokens that spell no character at all.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]  # else a leading space is dropped
    known = len(tokenizer.decode(anchor, clean_up_tokenization_spaces=False))
    pieces: list[str] = []
    while len(pieces) < len(ids):
        here = len(pieces)
        for count in range(1, _LONGEST_CHARACTER + 1):
            text = tokenizer.decode([*anchor, *ids[here : here + count]], clean_up_tokenization_spaces=False)[known:]
            if _BROKEN not in text:
                break
        else:
            count, text = 1, _in_bytes(tokenizer, ids[here])
        parts = ids[here : here + count]
        pieces += [*(_in_bytes(tokenizer, token) for token in parts[:-1]), text]
    return pieces


def _in_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    name = str(tokenizer.convert_ids_to_tokens(int(token)))
    if all(character in _BYTES for character in name) and not name.startswith("<"):
        name = " ".join(f"{_BYTES[character]:02X}" for character in name)
    return f"[{name}]"
