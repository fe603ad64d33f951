"""Reading question files, and spelling answers in the tokens of several tokenizers."""

from __future__ import annotations

import json

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import pyquiet
from pyquiet.evaluation import DIGITS, LETTERS, TASKS, read_commonsenseqa, read_gsm8k
from pyquiet.evaluation.tasks import spell
from pyquiet.tokens import continuation_ids, opening_ids, token_ids

CHOICES = {"label": list("ABCDE"), "text": ["one", "two", "three", "four", "five"]}


def pieces(pattern, words):
    """A tokenizer of these words, cut by a pattern."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["?", *words])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def written(tmp_path, *records):
    file = tmp_path / "items.jsonl"
    file.write_text(
        "\n".join(r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8"
    )
    return file


def test_gsm8k_items(tmp_path):
    first = {"question": "2 + 2\u2028?", "answer": "It is <<2+2=4>>4.\n#### 4"}
    items = read_gsm8k(written(tmp_path, first, "", {"question": "Owed?", "answer": "#### -1,200\n"}))
    assert [(item.prompt, item.answer) for item in items] == [
        ("Q: 2 + 2\u2028?\nA:", " 4"),
        ("Q: Owed?\nA:", " -1,200"),
    ]


def test_commonsenseqa_items(tmp_path):
    (item,) = read_commonsenseqa(written(tmp_path, {"question": "Which?", "choices": CHOICES, "answerKey": "D"}))
    assert item.prompt == "Q: Which?\n(A) one\n(B) two\n(C) three\n(D) four\n(E) five\nA:"
    assert item.answer == " D"


GSM = {"question": "q", "answer": "#### 4"}
CSQA = {"question": "q", "choices": CHOICES, "answerKey": "A"}


@pytest.mark.parametrize(
    ("read", "records", "line"),
    [
        (read_gsm8k, [GSM, "not json"], 2),
        (read_gsm8k, [GSM, "", CSQA], 3),
        (read_gsm8k, [GSM | {"answer": "4"}], 1),
        (read_gsm8k, [GSM | {"answer": "#### four"}], 1),
        (read_gsm8k, [GSM | {"answer": 4}], 1),
        (read_gsm8k, ["[1]"], 1),
        (read_commonsenseqa, [GSM], 1),
        (read_commonsenseqa, [CSQA | {"answerKey": "F"}], 1),
        (read_commonsenseqa, [CSQA, CSQA | {"choices": {"label": list("ABCD"), "text": list("abcd")}}], 2),
        (read_commonsenseqa, [CSQA | {"choices": CHOICES | {"text": ["a"]}}], 1),
    ],
)
def test_a_wrong_line_is_named(tmp_path, read, records, line):
    with pytest.raises(ValueError, match=rf"items\.jsonl, line {line}: not a"):
        read(written(tmp_path, *records))


def test_an_empty_file_has_no_items(tmp_path):
    with pytest.raises(ValueError, match="no items"):
        read_gsm8k(written(tmp_path, ""))


def test_characters_are_spelt_one_by_one(by_character):
    def ids(text):
        return [by_character.convert_tokens_to_ids(c) for c in text]

    tokens, valid = spell(by_character, " -1,20", DIGITS)
    assert tokens == ids(" -1,20\n")
    choices = [*ids(DIGITS), ids("\n")[0]]
    assert valid == [[], [], choices, [], choices, choices, choices]
    tokens, valid = spell(by_character, " C", LETTERS)
    assert tokens == ids(" C\n")
    assert valid == [[], *[[*ids(LETTERS), ids("\n")[0]]] * 2]


def test_a_space_may_belong_to_the_symbol():
    words = [*DIGITS, *(f" {d}" for d in DIGITS), "\n", "Q", "A", ":"]
    tokenizer = pieces(r" ?[0-9]|\n|[^\n0-9]", words)
    tokens, valid = spell(tokenizer, " 42", DIGITS)
    names = [tokenizer.convert_ids_to_tokens(choices) for choices in valid]
    assert tokenizer.convert_ids_to_tokens(tokens) == [" 4", "2", "\n"]
    assert names == [[*(f" {d}" for d in DIGITS), "\n"], [*DIGITS, "\n"], [*DIGITS, "\n"]]


@pytest.mark.parametrize(
    ("pattern", "words", "answer"),
    [
        (r"[0-9]+|[^0-9]", [str(i) for i in range(100)], "42"),  # numbers in one token
        (r"[0-9]+|[^0-9]", ["00", *(str(i) for i in range(100)), "\n"], "44"),
        (r" (?=42)|42| ?[0-9]|[^0-9]", [" ", "42", *DIGITS, *(f" {d}" for d in DIGITS), "\n"], " 42"),
        (r"(?:42|[0-9])|[^0-9]", [*DIGITS, "42"], "42"),  # this number alone
        (r"[0-9]\n|[^\n]", [*DIGITS, *(f"{d}\n" for d in DIGITS)], "42"),  # the newline belongs to the digit
        (r"[^\n]+|\n", ["\n"], "42"),  # unknown words
        (r"[\s\S]", [*DIGITS[:9], "\n"], "42"),  # a digit is missing
        (r"[\s\S]", [*DIGITS, "\n"], "none"),
        (r"[\s\S]", [*DIGITS, "\n"], ""),
    ],
)
def test_answers_that_no_token_spells_are_refused(pattern, words, answer):
    with pytest.raises(ValueError, match="not as a token for each of"):
        spell(pieces(pattern, [*words, "A", ":"]), answer, DIGITS)


def test_a_token_across_the_seam_is_refused():
    tokenizer = pieces(r"ab|[\s\S]", ["a", "b", "ab"])
    with pytest.raises(ValueError, match="share a token"):
        continuation_ids(tokenizer, "xa", "b")


def stored(folder):
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "task"), [("tiny-causal", "gsm8k"), ("tiny-causal", "commonsenseqa"), ("stories260K", "gsm8k")]
)
def test_every_item_of_the_real_files_is_spelt(shared, task, name):
    """And what is scored is the text as the tokenizer would write it whole."""
    tokenizer = pyquiet.load(name)[1] if name == "tiny-causal" else stored(shared / "models" / name)
    file = shared / "data" / task / ("test.jsonl" if task == "gsm8k" else "validation.jsonl")
    if not file.is_file():
        pytest.skip(f"no {file}")
    assert len(opening_ids(tokenizer)) == 1
    items = TASKS[task].read(file)
    assert len(items) == {"gsm8k": 1319, "commonsenseqa": 1221}[task]
    for item in items:
        tokens, valid = spell(tokenizer, item.answer, TASKS[task].symbols)
        symbols = [s for s in item.answer if s in TASKS[task].symbols]
        assert sum(map(bool, valid)) == len(symbols) + 1
        whole = token_ids(tokenizer, f"{item.prompt}{item.answer}\n")
        assert whole == token_ids(tokenizer, item.prompt) + tokens


def test_letters_of_which_some_have_a_space_are_refused(shared):
    with pytest.raises(ValueError, match="' A' and its newline"):
        spell(stored(shared / "models" / "stories260K"), " A", LETTERS)


def test_a_tokenizer_of_whole_numbers_is_refused(shared):
    tokenizer = stored(shared / "data" / "tokenizers" / "gpt2")
    assert opening_ids(tokenizer) == []
    assert len(spell(tokenizer, " C", LETTERS)[0]) == 2
    with pytest.raises(ValueError, match="' 42' and its newline"):
        spell(tokenizer, " 42", DIGITS)
