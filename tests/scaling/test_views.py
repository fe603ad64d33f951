"""What draft and target are shown of a chain."""

from __future__ import annotations

from typing import Any

import pytest

from pyquiet.scaling.backends.base import NO_USAGE, Generated
from pyquiet.scaling.backends.codec import HFCodec
from pyquiet.scaling.records import Question
from pyquiet.scaling.views import Views, encode_after

from .byte_tokens import byte_tokenizer, spaced_tokenizer

QUESTION = Question("q", "2+2?\n")
CHAT = "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}bot:"


class Model:
    """Only what a view asks of a backend."""

    def __init__(self, tokenizer: Any = None) -> None:
        self.codec = None if tokenizer is None else HFCodec(tokenizer)


def wrote(text: str, ids: Any = None) -> Generated:
    return Generated(ids, text, "length", NO_USAGE)


def test_ids_are_shared_and_never_made_again() -> None:
    draft, target = Model(byte_tokenizer([("a", "b")])), Model(byte_tokenizer([("a", "b")]))
    views = Views(draft, target, QUESTION)
    head = draft.codec.encode(QUESTION.text).ids
    a, b = draft.codec.encode("a").ids, draft.codec.encode("b").ids
    assert views.prompt("draft").ids == head
    views.append(wrote("a", a), "draft")
    prompt, start = views.with_chunk(wrote("b", b))
    assert (prompt.ids, start) == (head + a + b, len(head) + 1)  # no merge of a and b
    views.append(wrote("b", b), "target")
    assert views.prompt("draft") == views.prompt("target") == prompt
    assert views.text == "ab"
    assert prompt.text == "2+2?\nab"


def test_a_character_split_over_two_chunks_is_whole() -> None:
    model = Model(byte_tokenizer())
    views = Views(model, model, QUESTION)
    ids = model.codec.encode("€!").ids
    views.append(wrote("", ids[:2]), "draft")
    assert views.text == ""
    views.append(wrote("€!", ids[2:]), "target")
    assert views.text == "€!"


def test_spaces_between_chunks_stay() -> None:
    model = Model(spaced_tokenizer(["one", "two", "four"]))
    views = Views(model, model, Question("q", "one"))
    for word in (" two", " four"):
        views.append(wrote(word.strip(), model.codec.encode(word.strip()).ids), "draft")
    assert views.text == " two four"


def test_other_tokenizers_read_the_whole_and_score_what_overlaps() -> None:
    draft, target = Model(byte_tokenizer()), Model(byte_tokenizer([("a", "b"), ("?", "Ċ")], bos=True))
    views = Views(draft, target, QUESTION)
    views.append(wrote("xa", (0, 0)), "draft")
    prompt, start = views.with_chunk(wrote("bc", (0, 0)))
    whole = target.codec.encode("2+2?\nxabc")
    assert prompt.ids == (0, *whole.ids)
    assert whole.offsets[start - 1] == (6, 8)  # "ab" holds a character of the chunk, so it counts
    assert prompt.text == "2+2?\nxabc"
    assert views.prompt("draft").ids == draft.codec.encode("2+2?\nxa").ids
    assert views.prompt("target").ids == (0, *target.codec.encode("2+2?\nxa").ids)
    empty, end = views.with_chunk(wrote("", ()))
    assert end == len(empty.ids or ())


def test_characters_of_several_tokens_count_once() -> None:
    draft, target = Model(spaced_tokenizer([])), Model(byte_tokenizer())
    views = Views(draft, target, QUESTION)
    views.append(wrote("é"), "draft")
    prompt, start = views.with_chunk(wrote("€1"))
    assert len(prompt.ids or ()) - start == 4
    assert target.codec.decode((prompt.ids or ())[start:]) == "€1"


def test_without_a_tokenizer_there_is_text_alone() -> None:
    views = Views(Model(byte_tokenizer()), Model(), QUESTION)
    views.append(wrote("4", (20,)), "draft")
    prompt, start = views.with_chunk(wrote(".", (21,)))
    assert (prompt.ids, prompt.text, start) == (None, "2+2?\n4.", 6)
    assert views.prompt("target").ids is None
    assert views.prompt("draft").ids == views._heads["draft"].codec.encode("2+2?\n4").ids


def test_text_without_ids_is_put_among_shared_ids() -> None:
    model = Model(byte_tokenizer([("a", "b")]))
    views = Views(model, model, QUESTION)
    one = model.codec.encode("a").ids
    views.append(wrote("a", one), "draft")
    views.append(wrote("b, so"), "draft")
    assert (views.prompt("draft").ids or ())[-6:] == one + model.codec.encode("b, so").ids
    assert views.text == "ab, so"
    spaced = Model(spaced_tokenizer(["one", "two"]))
    assert encode_after(spaced.codec, "one", " two") == spaced.codec.encode("one two").ids[1:]
    assert spaced.codec.decode(spaced.codec.encode("one").ids + encode_after(spaced.codec, "one", "x")) == "onex"
    assert encode_after(spaced.codec, "one", "") == ()


def test_one_bos_and_only_at_the_beginning() -> None:
    model = Model(byte_tokenizer(bos=True))
    views = Views(model, model, QUESTION)
    assert (views.prompt("draft").ids or ()).count(0) == 1
    views.append(wrote("4", model.codec.encode("4").ids), "draft")
    prompt, _ = views.with_chunk(wrote(".", model.codec.encode(".").ids))
    assert (prompt.ids or ())[0] == 0
    assert (prompt.ids or ()).count(0) == 1
    spelled = Views(model, model, QUESTION, template="<s>{question}")
    assert (spelled.prompt("draft").ids or ())[:2] == (0, *model.codec.encode("2").ids)


def test_templates() -> None:
    chat, plain = Model(byte_tokenizer(template=CHAT, bos=True)), Model(byte_tokenizer(bos=True))
    views = Views(chat, plain, QUESTION, system="Think.")
    assert views.prompt("draft").text == "<s>system:Think.\n<s>user:2+2?\n\nbot:"
    assert (views.prompt("draft").ids or ()).count(0) == 2
    assert views.prompt("target").text == "Think.\n\n2+2?\n"
    assert (views.prompt("target").ids or ()).count(0) == 1
    views.append(wrote("4", (22,)), "draft")  # the same ids behind different heads
    assert (views.prompt("draft").ids or ())[-1] == (views.prompt("target").ids or ())[-1] == 22
    bare = Model(byte_tokenizer(template="user:{{ messages[0]['content'] }}", bos=True))
    assert 0 not in (Views(bare, bare, QUESTION).prompt("draft").ids or ())  # the template knows best
    assert Views(chat, plain, QUESTION, template="Q {question} {x}").prompt("draft").text == "Q 2+2?\n {x}"
    assert Views(chat, plain, QUESTION, template=lambda q: q * 2).prompt("target").text == "2+2?\n2+2?\n"


def test_bad_input_is_refused() -> None:
    model = Model(byte_tokenizer())
    with pytest.raises(ValueError, match=r"put \{question\} into 'Q:'"):
        Views(model, model, QUESTION, template="Q:")
    with pytest.raises(TypeError, match="or a callable, got int"):
        Views(model, model, QUESTION, template=3)  # type: ignore[arg-type]
    for kind in (model, Model()):
        with pytest.raises(ValueError, match="question 'e': nothing stands before the answer"):
            Views(kind, kind, Question("e", ""))
