"""Tokenizers as chains see them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pyquiet.scaling.backends.codec import HFCodec, decode_after

from .byte_tokens import byte_tokenizer, spaced_tokenizer

TEXT = "Tom pays 3 €, and 你好 says 🙂!"


def test_ids_and_the_characters_they_stand_for() -> None:
    codec = HFCodec(byte_tokenizer([("a", "b")]))
    encoded = codec.encode("abé")
    assert [("abé"[b:e]) for b, e in encoded.offsets] == ["ab", "é", "é"]
    assert codec.decode(encoded.ids) == "abé"
    assert codec.size == 2 + 256 + 1


def test_nothing_is_put_before_a_text_but_by_opening() -> None:
    plain, opened = HFCodec(byte_tokenizer()), HFCodec(byte_tokenizer(bos=True))
    assert plain.opening == ()
    assert opened.opening == (0,)
    assert plain.encode("ab") == opened.encode("ab")


def test_special_tokens_are_read_where_they_are_spelled_out_and_not_written() -> None:
    codec = HFCodec(byte_tokenizer())
    ids = codec.encode("<s>ab</s>").ids
    assert (ids[0], ids[-1], len(ids)) == (0, 1, 4)
    assert codec.decode(ids) == "ab"


@pytest.mark.parametrize("codec", [HFCodec(byte_tokenizer()), HFCodec(spaced_tokenizer(["Tom", "pays"]))])
def test_a_character_is_held_back_until_all_its_bytes_are_there(codec: HFCodec) -> None:
    ids = codec.encode(TEXT).ids
    parts = [codec.decode(ids[:k]) for k in range(len(ids) + 1)]
    assert all(TEXT.startswith(part) for part in parts)
    assert all(len(a) <= len(b) for a, b in pairwise(parts))
    assert parts[-1] == TEXT
    assert set(parts) >= {TEXT[: TEXT.index("好")], TEXT[: TEXT.index("好") + 1]}  # a run of bytes, cut within


def test_what_ids_add_is_read_behind_those_before() -> None:
    codec = HFCodec(spaced_tokenizer(["one", "two", "three"]))
    ids = codec.encode("one two three é").ids
    assert codec.decode(ids[1:2]) == "two"  # alone
    pieces = [decode_after(codec, ids[:k], ids[k : k + 1]) for k in range(len(ids))]
    assert "".join(pieces) == "one two three é"
    assert pieces[1] == " two"
    assert pieces[-2:] == ["", "é"]


def test_fingerprints_tell_vocabularies_apart_and_nothing_else() -> None:
    tokenizer = byte_tokenizer([("a", "b")])
    before = HFCodec(tokenizer).fingerprint
    tokenizer(["a", "abc"], padding=False, truncation=True, max_length=2)  # leaves its mark on the tokenizer
    assert HFCodec(tokenizer).fingerprint == before
    assert len(HFCodec(tokenizer).encode("abcabc").ids) == 4  # and none on the codec
    assert HFCodec(byte_tokenizer([("a", "b")], bos=True, template="x")).fingerprint == before
    assert HFCodec(byte_tokenizer([("a", "c")])).fingerprint != before


def test_a_template_shows_the_question() -> None:
    template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    codec = HFCodec(byte_tokenizer(template=template))
    assert codec.has_template
    assert not HFCodec(byte_tokenizer()).has_template
    assert codec.render("2+2?", None) == "<s>user: 2+2?\nassistant:"
    assert codec.render("2+2?", "Think.") == "<s>system: Think.\n<s>user: 2+2?\nassistant:"


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match=r"must be a fast one .* got Slow; load it with AutoTokenizer"):
        HFCodec(Slow())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["data/tokenizers/gpt2", "models/stories260K"])
def test_real_tokenizers(shared: Path, name: str) -> None:
    if not (shared / name).is_dir():
        pytest.skip(f"no {name}")
    codec = HFCodec(AutoTokenizer.from_pretrained(shared / name))
    encoded = codec.encode(TEXT)
    assert all(TEXT.startswith(codec.decode(encoded.ids[:k])) for k in range(len(encoded.ids)))
    assert (
        "".join(decode_after(codec, encoded.ids[:k], encoded.ids[k : k + 1]) for k in range(len(encoded.ids))) == TEXT
    )
    assert encoded.offsets[-1][1] == len(TEXT)
