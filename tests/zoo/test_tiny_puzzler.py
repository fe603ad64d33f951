"""The embedded thinking model follows three arrows when it thinks, and guesses when it does not."""

import random

import pytest

import pyquiet
from pyquiet.cli import main

SYMBOLS = "abcdef"


def chase(generator):
    """A text that asks where three arrows lead, the way there and the answer."""
    arrows = dict(zip(SYMBOLS, generator.sample(SYMBOLS, 6), strict=True))
    start = generator.choice(SYMBOLS)
    way = [arrows[start], arrows[arrows[start]]]
    pairs = [f"{a}>{b}" for a, b in arrows.items()]
    generator.shuffle(pairs)
    return f"{' '.join(pairs)} {start} ?3", " ".join(way), arrows[way[1]]


@pytest.fixture(scope="module")
def chases():
    generator = random.Random(0)
    return [chase(generator) for _ in range(100)]


def answers(chases, **options):
    model, tokenizer = pyquiet.load("tiny-puzzler")
    inputs = tokenizer([text for text, _, _ in chases], return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, **options)
    return tokenizer, out, tokenizer.batch_decode(out.sequences[:, -1:])


def test_it_answers_by_thinking(chases):
    tokenizer, out, words = answers(chases, seed=0, return_thoughts=True)
    right = [word == answer for word, (_, _, answer) in zip(words, chases, strict=True)]
    assert sum(right) >= 95
    ways = [tokenizer.decode(row) for row in out.thoughts.tokens[:, 0, 0]]
    assert sum(way == true for way, (_, true, _) in zip(ways, chases, strict=True)) >= 85


def test_it_guesses_without(chases):
    _, _, words = answers(chases, think="never")
    assert sum(word == answer for word, (_, _, answer) in zip(words, chases, strict=True)) <= 75


def test_the_command_line_knows_it_by_name(capsys):
    words = [
        "--prompt",
        "a>c b>a c>f d>b e>d f>e b ?3",
        "--max-new-tokens",
        "1",
        "--temperature",
        "0",
        "--show-thoughts",
    ]
    assert main(["think", "--model", "tiny-puzzler", *words]) == 0
    out = capsys.readouterr()
    assert "' f'" in out.out
    assert "thought 'a c'" in out.out
    assert "not learned" not in out.err
    assert main(["think", "--model", "tiny-puzzler", "--thought-tokens", "3", *words]) == 2
    assert main(["think", "--model", "tiny-nobody", *words]) == 2
    error = capsys.readouterr().err
    assert "tiny-causal" in error
    assert "tiny-puzzler" in error
