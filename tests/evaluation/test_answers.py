"""Direct answers against a slow computation that asks the model for one token of one item at a time."""

from __future__ import annotations

import json
import math

import pytest
import torch

import pyquiet
from pyquiet.evaluation import DIGITS, LETTERS, AnswerItem, direct_answers, read_commonsenseqa, read_gsm8k
from pyquiet.tokens import opening_ids

from .conftest import CHARACTERS

ITEMS = [
    AnswerItem("How many?", " 17"),
    AnswerItem("A long question: how many is one and one and one?", " 3"),
    AnswerItem("Owed", " -1,205"),
    AnswerItem("x", " 40"),
    AnswerItem("", " 9"),
]

TOLERANCE = {"never": 1e-6, "always": 1e-10}  # a plain model's `generate` hands its logits out in float32


def quiet(*arguments, **options):
    return direct_answers(*arguments, progress=False, **options)


def slow_scores(model, number, text, start, symbols, **options):
    """Probability of the answer text[start:] and whether it is the likeliest, character by character."""
    valid = [CHARACTERS.index(c) for c in [*symbols, "\n"]]
    probability, correct = 1.0, True
    for end in range(start, len(text)):
        if text[end] not in symbols and text[end] != "\n":
            continue
        ids = torch.tensor([[CHARACTERS.index(c) for c in text[:end]]])
        if options["think"] == "always":
            options["sequence_ids"] = torch.tensor([number])
        logits = model(ids, **options).logits[0, -1].tolist()
        weights = {v: math.exp(logits[v]) for v in valid}
        truth = CHARACTERS.index(text[end])
        probability *= weights[truth] / math.fsum(weights.values())
        correct &= weights[truth] == max(weights.values())
    return probability, correct


@pytest.mark.parametrize("thoughts", [1, 3])
@torch.no_grad()
def test_scores_are_those_of_a_slow_computation(reader, by_character, thoughts):
    result = quiet(reader, by_character, ITEMS, DIGITS, seed=4, thoughts_per_token=thoughts, batch_size=2)
    for n, item in enumerate(ITEMS):
        text = f"Q: {item.question}\nA:{item.answer}\n"
        start = len(text) - len(item.answer) - 1
        always = {"think": "always", "seed": 4, "thoughts_per_token": thoughts}
        for think, options in (("never", {"think": "never"}), ("always", always)):
            probability, correct = slow_scores(reader, n, text, start, DIGITS, **options)
            scores = result.scores[think]
            assert scores.probability[n].item() == pytest.approx(probability, rel=TOLERANCE[think])
            assert scores.correct[n] == correct
    assert (result.scores["never"].probability - result.scores["always"].probability).abs().max() > 1e-5
    assert result.truncated == 0


@torch.no_grad()
def test_the_likeliest_answer_is_correct_and_no_other(reader, by_character):
    """Digits that lead the restricted law are taken until the newline does."""
    ids = [by_character.convert_tokens_to_ids(c) for c in [*DIGITS, "\n"]]
    questions = [f"What is {i}?" for i in range(40)]
    found = []
    for question in questions:
        text = f"Q: {question}\nA: "
        for _ in range(4):
            law = reader.base(torch.tensor([by_character(text).input_ids])).logits[0, -1, ids]
            best = [*DIGITS, "\n"][law.argmax()]
            if best == "\n":
                break
            text += best
        answer = text.partition("A:")[2]
        if best == "\n" and answer != " ":
            found.append(AnswerItem(question, answer))
    assert len(found) >= 3
    scores = quiet(reader, by_character, found, DIGITS, think=("never",)).scores["never"]
    assert scores.correct.all()
    longer = [AnswerItem(item.question, item.answer + "0") for item in found]
    assert not quiet(reader, by_character, longer, DIGITS, think=("never",)).scores["never"].correct.any()


def test_results_do_not_depend_on_the_batch(reader, by_character):
    whole = quiet(reader, by_character, ITEMS, DIGITS, batch_size=5)
    alone = quiet(reader, by_character, ITEMS, DIGITS, batch_size=1)
    for think in ("never", "always"):
        x, y = whole.scores[think], alone.scores[think]
        torch.testing.assert_close(x.probability, y.probability, rtol=TOLERANCE[think], atol=0)
        assert torch.equal(x.correct, y.correct)


def test_a_plain_model_scores_as_one_that_never_thinks(reader, by_character):
    plain = quiet(reader.base, by_character, ITEMS, DIGITS, think=("never",))
    both = quiet(reader, by_character, ITEMS, DIGITS)
    assert torch.equal(plain.scores["never"].probability, both.scores["never"].probability)
    assert plain.gain is None


@torch.no_grad()
def test_a_long_question_loses_its_beginning_and_the_answer_nothing(reader, by_character):
    result = quiet(reader, by_character, ITEMS, DIGITS, think=("never",), max_length=20)
    assert result.truncated == 1
    text = f"Q: {ITEMS[1].question}\nA: 3\n"[-20:]
    expected, _ = slow_scores(reader, 1, text, 18, DIGITS, think="never")
    assert result.scores["never"].probability[1].item() == pytest.approx(expected, rel=TOLERANCE["never"])
    assert quiet(reader, by_character, ITEMS[:1], DIGITS, think=("never",), max_length=19).truncated == 0
    assert quiet(reader, by_character, ITEMS[:1], DIGITS, think=("never",), max_length=18).truncated == 1
    with pytest.raises(ValueError, match="max_length=8 leaves no room"):
        quiet(reader, by_character, ITEMS, DIGITS, max_length=8)


def test_report(reader, by_character):
    result = quiet(reader, by_character, ITEMS, DIGITS)
    report = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    p = result.scores["always"].probability
    assert report["always"]["probability"]["mean"] == pytest.approx(p.mean().item())
    assert report["always"]["probability"]["standard_error"] == pytest.approx(p.std().item() / math.sqrt(5))
    accuracy = result.scores["never"].correct.double().mean().item()
    assert report["never"]["accuracy"]["mean"] == pytest.approx(accuracy)
    difference = p - result.scores["never"].probability
    assert report["gain"]["mean"] == pytest.approx(difference.mean().item())
    assert report["gain"]["standard_error"] == pytest.approx(difference.std().item() / math.sqrt(5))
    assert (report["items"], report["truncated"]) == (5, 0)
    assert "5 items, 0 with a shortened question" in str(result)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"items": []}, "items is empty"),
        ({"think": ("sometimes",)}, "sometimes"),
        ({"think": ()}, "think is empty"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_bad_arguments_are_named(reader, by_character, change, named):
    with pytest.raises(ValueError, match=named):
        quiet(reader, by_character, symbols=DIGITS, **({"items": ITEMS} | change))


def test_a_plain_model_cannot_be_asked_to_think(reader, by_character):
    with pytest.raises(ValueError, match="from_base"):
        quiet(reader.base, by_character, ITEMS, DIGITS)


@torch.no_grad()
def test_the_real_files_with_the_embedded_model(shared):
    base, tokenizer = pyquiet.load("tiny-causal")
    model = pyquiet.QuietStarForCausalLM.from_base(base, tokenizer=tokenizer, thought_tokens=2)
    torch.nn.init.normal_(model.mixing_head[-1].weight, std=0.1)
    (opening,) = opening_ids(tokenizer)
    for read, name, symbols in (
        (read_gsm8k, "gsm8k/test.jsonl", DIGITS),
        (read_commonsenseqa, "commonsenseqa/validation.jsonl", LETTERS),
    ):
        file = shared / "data" / name
        if not file.is_file():
            pytest.skip(f"no {file}")
        items = read(file)[:4]
        result = quiet(model, tokenizer, items, symbols, max_length=512)
        for n, item in enumerate(items):
            text = torch.tensor(
                [[opening, *tokenizer(item.prompt + item.answer + "\n", add_special_tokens=False)[0].ids]]
            )
            for think in ("never", "always"):
                options = {"seed": 0, "sequence_ids": torch.tensor([n])} if think == "always" else {}
                law = model(text, think=think, **options).logits[0, :-1]
                expected = 1.0
                for logits, token in zip(law, text[0, 1:].tolist(), strict=True):
                    name = tokenizer.decode([token])
                    answer = [c if symbols == DIGITS else f" {c}" for c in symbols] + ["\n"]
                    ids = [tokenizer(c, add_special_tokens=False).input_ids[-1] for c in answer]
                    expected = expected * (logits[ids].softmax(0)[answer.index(name)].item() if name in answer else 1.0)
                    if name == ":":
                        expected = 1.0  # of what follows the last colon
                assert result.scores[think].probability[n].item() == pytest.approx(expected, rel=1e-4)
