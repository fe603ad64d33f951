r"""Texts with gaps: their syntax and their tokens; code written by a tokenizer that drops white space."""

import pytest

import pyquiet
from pyquiet.gaps import Codec, decode_code, drops_white_space, encode_code, parse_gaps

from .any_subset.tokenizers import small_xlnet_tokenizer

DEFAULT = range(7, 8)
CODE = "def f(x):\n\treturn a\n  if b:\n    return (un, able)\n\n      c = 1\n"


@pytest.mark.parametrize(
    ("text", "parts", "lengths"),
    [
        ("The ___ sat", ["The ", " sat"], [DEFAULT]),
        ("_____", ["", ""], [DEFAULT]),
        ("a___3___b___2-5___", ["a", "b", ""], [range(3, 4), range(2, 6)]),
        ("___ ___", ["", " ", ""], [DEFAULT, DEFAULT]),
        ("___2______3____", ["", "", ""], [range(2, 3), range(3, 4)]),
        ("____2_______ b", ["", " b"], [range(2, 3)]),
        ("a ___3 b", ["a ", "3 b"], [DEFAULT]),
        (r"__init__ \_\_\_ \\___ \n", ["__init__ ___ \\", r" \n"], [DEFAULT]),
        ("é___1___\n", ["é", "\n"], [range(1, 2)]),
    ],
)
def test_syntax(text, parts, lengths):
    assert parse_gaps(text, DEFAULT) == (parts, lengths)


@pytest.mark.parametrize("text", ["", "nothing", "__", r"\___", "___0___", "___5-2___", "___3-___", "___1-2-3___"])
def test_other_syntax_is_refused(text):
    with pytest.raises(ValueError, match="gap"):
        parse_gaps(text, DEFAULT)


def pieces(codec, text, trim=True):
    found = codec.gapped(*parse_gaps(text, DEFAULT), trim=trim).pieces
    return [codec.tokenizer.convert_ids_to_tokens(piece) for piece in found]


def test_pieces_of_a_tokenizer_whose_words_carry_their_space():
    codec = Codec(pyquiet.load("tiny-causal")[1])
    assert pieces(codec, "The ___ house. ___") == [["<bos>", "The"], ["\u0120house", "."], []]
    assert pieces(codec, "The ___", trim=False) == [["<bos>", "The", "\u0120"], []]
    assert pieces(codec, "in___ed") == [["<bos>", "in"], ["ed"]]


def test_pieces_of_a_tokenizer_that_begins_each_text_with_a_word():
    codec = Codec(small_xlnet_tokenizer())
    assert pieces(codec, "The ___ sat") == [["\u2581The"], ["\u2581sat"]]
    assert pieces(codec, "un___able") == [["\u2581un"], ["able"]]
    assert pieces(codec, "cat___.") == [["\u2581cat"], ["."]]


def test_special_tokens_are_banned_but_for_the_white_space_of_code():
    tokenizer = small_xlnet_tokenizer()
    V = len(tokenizer) + 2
    text, code = (Codec(tokenizer, code).banned(V).nonzero().flatten().tolist() for code in (False, True))
    assert text == [*range(9), V - 2, V - 1]
    assert tokenizer.convert_ids_to_tokens(code[:-2]) == ["<s>", "</s>", "<mask>", "<eod>", "<eop>"]


def test_parts_are_cut_behind_whole_characters():
    codec = Codec(pyquiet.load("tiny-causal")[1])
    ids = codec.encode("caf\u00e9 a")
    cut = next(i for i in range(len(ids)) if "\ufffd" in codec.decode(ids[: i + 1])) + 1  # in the middle of the \u00e9
    given = [True] * cut + [False] * (len(ids) - cut)
    assert codec.parts(ids, given) == [("caf", False), ("\u00e9 a", True)]
    words = [*codec.encode("The"), *codec.encode(" cat sat")]
    parts = codec.parts(words, [i != 1 for i in range(len(words))])
    assert "".join(part for part, _ in parts) == "The cat sat"
    assert [is_filled for _, is_filled in parts] == [False, True, False]


def test_runs_hold_their_state_and_length_where_they_say_nothing_too():
    codec = Codec(pyquiet.load("tiny-causal")[1])
    the, cat = codec.encode("The"), codec.encode(" cat")
    ids, states = [0, *the, 0, 0, *cat], ["bos", *"g" * len(the), "m", "m", *"f" * len(cat)]
    assert codec.runs(ids, states) == [("", "bos", 1), ("The", "g", len(the)), ("", "m", 2), (" cat", "f", len(cat))]


def test_what_a_tokenizer_closes_a_text_with_stands_behind_it_on_request():
    codec = Codec(small_xlnet_tokenizer())
    parts = (["The ", " sat"], [DEFAULT])
    closing = codec.tokenizer("sat")["input_ids"][1:]
    assert len(closing) == 2
    (first, last), (again, closed) = (codec.gapped(*parts, close=close).pieces for close in (False, True))
    assert (again, closed) == (first, last + closing)


def test_code_is_written_with_the_tokens_of_the_release_and_read_back():
    tokenizer = small_xlnet_tokenizer()
    assert drops_white_space(tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(encode_code(tokenizer, "def f:\n\t    return a\n"))
    assert "".join(pieces) == "\u2581def\u2581f:<cls><sep><unk><unk>\u2581return\u2581a<cls>"
    assert decode_code(tokenizer, encode_code(tokenizer, CODE)) == CODE
    # The release looks for two spaces before it looks for three.
    three = encode_code(tokenizer, "\n   a")
    assert tokenizer.pad_token_id not in three
    assert decode_code(tokenizer, three) == "\n  a"
    assert decode_code(tokenizer, [tokenizer.pad_token_id, *three[-1:]]) == "   a"
    tokenizer.cls_token = None
    with pytest.raises(ValueError, match="code must have a tokenizer with cls_token"):
        encode_code(tokenizer, CODE)


def test_a_tokenizer_that_keeps_white_space_has_no_need_of_it():
    tokenizer = pyquiet.load("tiny-causal")[1]
    assert not drops_white_space(tokenizer)
    with pytest.raises(ValueError, match="cls_token"):
        encode_code(tokenizer, "a\n")
