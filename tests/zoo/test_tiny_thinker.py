"""The embedded thinking model finds by thinking what it cannot say at once, and is as good as its card says."""

import re
from pathlib import Path

import pytest

import pyquiet
from pyquiet import zoo
from pyquiet.cli import main

FOLDER = Path(zoo.__file__).parent / "tiny-thinker"
RING = "There were four friends. Anne wrote to Tom. Joe wrote to Emma. Tom wrote to Joe. Emma wrote to Anne."


@pytest.fixture(scope="module")
def questions():
    """Held-out stories of letters up to an answer that takes two steps or more, and these answers."""
    found = []
    for story in zoo.held_out("stories"):
        if story["kind"] == "letters":
            for match in re.finditer(r"(?:twice|times), came to( \w+)\.", story["text"]):
                found.append((story["text"][: match.start(1)], match[1]))
    return found


def answers(questions, **options):
    model, tokenizer = pyquiet.load("tiny-thinker")
    tokenizer.padding_side = "left"
    inputs = tokenizer([q for q, _ in questions], return_tensors="pt", padding=True, return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, **options)
    return tokenizer, out, tokenizer.batch_decode(out.sequences[:, -1:])


def test_it_answers_by_thinking_and_guesses_without(questions):
    assert len(questions) > 100
    rights = {
        name: sum(word == answer for word, (_, answer) in zip(answers(questions, **options)[2], questions, strict=True))
        for name, options in (("always", {"seed": 0}), ("never", {"think": "never"}))
    }
    assert rights["always"] >= 0.75 * len(questions)
    assert rights["never"] <= 0.55 * len(questions)


def test_its_thought_is_the_way_to_the_answer():
    question = f"{RING} A letter from Anne, passed on three times, came to"
    tokenizer, out, (word,) = answers([(question, "")], seed=0, return_thoughts=True)
    assert word == " Emma"
    assert tokenizer.decode(out.thoughts.tokens[0, 0, 0]).startswith(" Tom Joe")
    assert out.thoughts.weight[0, 0, 0].abs() > 0.3  # it may well be negative


def test_its_tokens_are_those_of_the_causal_model():
    assert pyquiet.load("tiny-thinker")[1].get_vocab() == pyquiet.load("tiny-causal")[1].get_vocab()


def test_the_command_line_knows_it_by_name(capsys):
    prompt = f"{RING} A letter from Joe, passed on twice, came to"
    words = ["--prompt", prompt, "--max-new-tokens", "1", "--temperature", "0", "--show-thoughts"]
    assert main(["think", "--model", "tiny-thinker", *words]) == 0
    out = capsys.readouterr()
    assert "' Anne'" in out.out
    assert "thought ' Emma" in out.out
    assert "not learned" not in out.err
