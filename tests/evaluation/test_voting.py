"""Majority votes: numbers, ties, and what is asked of the model."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import pyquiet
from pyquiet.evaluation import AnswerItem, first_integer, majority, majority_vote, read_gsm8k
from pyquiet.evaluation.voting import chosen_items

from .conftest import CHARACTERS

ITEMS = [AnswerItem(f"What is {i} more than {i}", f" {2 * i}") for i in range(5)]


def quiet(*arguments, **options):
    return majority_vote(*arguments, progress=False, **options)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 18.", 18),
        (" $1,000 a year", 1000),
        (" 1,234,567", 1234567),
        (" 12,34", 12),
        (" 1,0000", 1),
        (" 1000,000", 1000),
        (" -3 degrees", -3),
        (" -$5", -5),
        (" $-5", -5),
        (" in week-2 of 7", 2),
        (" 10-3", 10),
        (" 3.75", 3),
        (" 007", 7),
        (" many", None),
        ("", None),
        (" $", None),
    ],
)
def test_first_integer(text, number):
    assert first_integer(text) == number


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        ([1, 2, 2], 2),
        ([1, 2, 2, 1], 2),  # the first to have two
        ([3, 2, 1], 3),
        ([None, None, 5], 5),
        ([None, 1, None], 1),
        ([None, None], None),
        ([], None),
        ([-1, 0, 0, -1, -1], -1),
    ],
)
def test_majority(votes, winner):
    assert majority(votes) == winner


def test_items_are_drawn_as_datasets_shuffles_them():
    assert chosen_items(1319, 4) == [30, 754, 429, 1010]
    assert sorted(chosen_items(7, 100)) == list(range(7))
    datasets = pytest.importorskip("datasets")
    shuffled = datasets.Dataset.from_dict({"i": list(range(1319))}).shuffle(seed=42)["i"]
    assert chosen_items(1319, 128) == list(shuffled)[:128]


class Scripted:
    """A plain model that writes what a function of the prompt says, then its end of text, padded with zeros."""

    device = torch.device("cpu")

    def __init__(self, write):
        self.write, self.prompts, self.options = write, [], []
        text = SimpleNamespace(max_position_embeddings=500)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.generation_config = SimpleNamespace(eos_token_id=[1, 0])

    def generate(self, ids, attention_mask, max_new_tokens, **options):
        self.options.append({"max_new_tokens": max_new_tokens, **options})
        rows = []
        for row, mask in zip(ids, attention_mask, strict=True):
            prompt = "".join(CHARACTERS[i] for i in row[mask.bool()])
            assert not mask[: int((mask == 0).sum())].any()  # padding on the left
            self.prompts.append(prompt)
            new = [CHARACTERS.index(c) for c in self.write(prompt)] + [1]
            rows.append(torch.tensor((new + [0] * max_new_tokens)[:max_new_tokens]))
        return SimpleNamespace(sequences=torch.cat([ids, torch.stack(rows)], 1))


def test_what_is_asked_and_how_it_is_counted(by_character):
    answers = iter(["4", " is 6", " six", " 4", " 4.", "", " 1", " 2", " 1,0", " no", " no", " none"])

    def write(prompt):
        if prompt.endswith("step by step."):
            return " Easy" if "3 more" in prompt else ""
        return next(answers)

    model = Scripted(write)
    result = quiet(model, by_character, ITEMS, think="never", limit=4, num_samples=3, batch_size=6, temperature=0.7)
    order = chosen_items(5, 4)
    assert result.items == order
    assert result.answers == [2 * i for i in order]
    assert result.votes == [[4, 6, None], [4, 4, None], [1, 2, 1], [None, None, None]]
    assert result.winners == [4, 4, 1, None]
    assert result.correct.tolist() == [order[0] == 2, order[1] == 2, False, False]
    ask = [f"Q: What is {i} more than {i}\nA: Let's think step by step." for i in order for _ in range(3)]
    end = "\nTherefore, the answer (arabic numerals) is"
    asked = [text + (" Easy" if "3 more" in text else "") + end for text in ask]
    assert model.prompts == ask[:6] + asked[:6] + ask[6:] + asked[6:]
    assert [options["max_new_tokens"] for options in model.options] == [384, 12] * 2
    for options in model.options:
        assert (options["do_sample"], options["temperature"], options["top_k"], options["top_p"]) == (True, 0.7, 0, 1.0)
        assert "think" not in options
        assert "seed" not in options
    report = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert report["items"][0] == {"item": order[0], "answer": 2 * order[0], "winner": 4, "votes": [4, 6, None]}
    right = [sum(v == 2 * i for v in votes) / 3 for i, votes in zip(order, result.votes, strict=True)]
    assert report["sample_accuracy"]["mean"] == pytest.approx(sum(right) / 4)
    assert "7 votes of 12 hold an integer" in str(result)


def test_a_thinking_models_votes_do_not_depend_on_the_batch(reader, by_character, monkeypatch):
    texts = []
    monkeypatch.setattr("pyquiet.evaluation.voting.first_integer", lambda text: texts.append(text))
    runs = []
    for batch_size, samples in ((4, 3), (1, 3), (5, 2)):
        texts.clear()
        quiet(
            reader, by_character, ITEMS, limit=2, num_samples=samples, max_new_tokens=6, batch_size=batch_size, seed=3
        )
        runs.append([texts[i : i + samples] for i in range(0, len(texts), samples)])
    assert runs[0] == runs[1]
    assert [row[:2] for row in runs[0]] == runs[2]
    written = [text for row in runs[0] for text in row]
    assert len(set(written)) == len(written) == 6


@pytest.mark.parametrize("batch_size", [1, 4])
def test_draws_are_counted_by_item_and_sample(by_character, batch_size):
    model = Scripted(lambda prompt: "1")
    model.think_at_every_token = None  # what tells a thinking model
    quiet(model, by_character, ITEMS, num_samples=3, batch_size=batch_size, seed=9, thoughts_per_token=2)
    ids = [options["sequence_ids"].tolist() for options in model.options]
    assert ids[::2] == ids[1::2]  # of reasoning and of its answer
    assert [i for batch in ids[::2] for i in batch] == [
        i + 2**24 * sample for i in chosen_items(5, 5) for sample in range(3)
    ]
    for options in model.options:
        assert (options["think"], options["seed"], options["thoughts_per_token"]) == ("always", 9, 2)


@pytest.mark.parametrize("plain", [True, False])
def test_a_model_that_does_not_think_leaves_torchs_generator_as_it_was(reader, by_character, plain, monkeypatch):
    texts = []
    monkeypatch.setattr("pyquiet.evaluation.voting.first_integer", lambda text: texts.append(text))
    model = reader.base if plain else reader
    state = torch.random.get_rng_state()
    options = {"think": "never", "limit": 2, "num_samples": 2, "max_new_tokens": 5}
    for seed in (0, 0, 1):
        quiet(model, by_character, ITEMS, seed=seed, batch_size=1, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert texts[:4] == texts[4:8]
    assert texts[4:8] != texts[8:]
    assert len(set(texts[:4])) == 4


def test_temperature_zero_is_greedy(reader, by_character):
    model = Scripted(lambda prompt: "1")
    quiet(model, by_character, ITEMS, think="never", limit=1, num_samples=1, temperature=0)
    assert model.options[0]["do_sample"] is False


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"num_samples": 257}, "num_samples must be at most 256, got 257"),
        ({"limit": 0}, "limit must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"max_new_tokens": 600}, "max_position_embeddings"),
        ({"temperature": -1.0}, "temperature must be .* got -1"),
        ({"think": "both"}, "both"),
        ({"items": []}, "items is empty"),
    ],
)
def test_bad_options_are_named(reader, by_character, options, named):
    with pytest.raises(ValueError, match=named):
        quiet(reader, by_character, **({"items": ITEMS} | options))


def test_the_longest_prompt_just_fits(reader, by_character):
    """640 places: prompt, reasoning, the question for the number, 12 tokens and a thought of START, 2, END."""
    prompt = len(f"Q: {ITEMS[0].question}\nA: Let's think step by step.")
    room = 640 - prompt - len("\nTherefore, the answer (arabic numerals) is") - 12 - 4
    options = {"limit": 1, "num_samples": 1, "temperature": 0.0}
    with pytest.raises(ValueError, match="lower it by 1,"):
        quiet(reader, by_character, ITEMS, max_new_tokens=room + 1, **options)
    with pytest.raises(ValueError, match="lower it by 996,"):
        quiet(reader, by_character, ITEMS, max_new_tokens=room + 996, **options)


def test_the_real_file_with_the_embedded_model(shared):
    file = shared / "data" / "gsm8k" / "test.jsonl"
    if not file.is_file():
        pytest.skip(f"no {file}")
    base, tokenizer = pyquiet.load("tiny-causal")
    model = pyquiet.QuietStarForCausalLM.from_base(base, tokenizer=tokenizer, thought_tokens=1)
    result = quiet(model, tokenizer, read_gsm8k(file), limit=2, num_samples=2, max_new_tokens=8)
    assert result.items == [30, 754]
    assert all(len(votes) == 2 for votes in result.votes)
