"""The story world: every conclusion follows from its facts, by a reader of the text that shares no code with it."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import pyquiet
from pyquiet.zoo import held_out

RECIPE = Path(__file__).parents[2] / "recipes" / "story_world"
MODULES = ("world", "texts", "prepare", "corpus")
TIMES = {"once": 1, "twice": 2, "three times": 3, "four times": 4}
COUNT = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}


@pytest.fixture(scope="module")
def recipe() -> Iterator[SimpleNamespace]:
    """The recipe's modules by name; other recipes have some of the same names."""
    if not RECIPE.is_dir():
        pytest.skip(f"no recipe folder {RECIPE}")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RECIPE.with_name("tiny_any_subset"))
        patch.syspath_prepend(RECIPE)
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        modules = SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
        yield modules
        for name in MODULES:
            sys.modules.pop(name, None)


def read_letters(text: str) -> int:
    """Checks a story of letters; how many conclusions it has."""
    head, *_ = text.split(" A letter from ", 1)
    writes = dict(re.findall(r"(\w+) wrote to (\w+)\.", head))
    assert COUNT[re.match(r"There were (\w+) friends\.", text)[1]] == len(writes)
    found = re.findall(r"A letter from (\w+), passed on ([a-z ]+), came to(-- [\w ]+--)? (\w+)\.", text)
    for first, times, steps, answer in found:
        chain = [writes[first]]
        while len(chain) < TIMES[times]:
            chain.append(writes[chain[-1]])
        assert answer == chain[-1]
        assert steps in ("", f"-- {' '.join(chain[:-1])}--")
        assert not (steps and len(chain) == 1)
    return len(found)


def read_journeys(text: str) -> int:
    place, holder = {}, {}
    for sentence in re.findall(r"[^.]+\.", text):
        if match := re.match(r" ?(\w+) went to the (\w+)\.", sentence):
            place[match[1]] = match[2]
        elif match := re.match(r" ?(\w+) took the (\w+)\.", sentence):
            holder[match[2]] = match[1]
        elif match := re.match(r" ?(\w+) sent the (\w+) to (\w+)\.", sentence):
            assert holder[match[2]] == match[1] != match[3]
            holder[match[2]] = match[3]
    found = re.findall(r"The (\w+) was now (?:with (\w+)|in the(?:-- (\w+)--)? (\w+))\.", text)
    for thing, person, step, where in found:
        assert (person or holder[thing]) == holder[thing]
        assert (step or holder[thing]) == holder[thing]
        assert (where or place[holder[thing]]) == place[holder[thing]]
    return len(found)


def read_sums(text: str) -> int:
    parts = re.findall(r"(\w+) had (\w+) (\w+?)s?\. (.*?)Then \1 had(?:-- ([\w ]+)--)? (\w+) \3s?\.", text)
    for _, start, _, changes, steps, answer in parts:
        totals = [COUNT[start]]
        for verb, by in re.findall(r"(found|got|lost|gave away) (\w+)\.", changes):
            totals.append(totals[-1] + COUNT[by] * (1 if verb in ("found", "got") else -1))
        assert min(totals) >= 1
        assert COUNT[answer] == totals[-1]
        assert [COUNT[word] for word in steps.split()] in ([], totals[1:-1])
    return len(parts)


READERS = {"letters": (read_letters, 4), "journeys": (read_journeys, 3), "sums": (read_sums, 3)}


@pytest.mark.parametrize("kind", READERS)
def test_every_conclusion_follows(recipe, kind):
    reader, conclusions = READERS[kind]
    for seed in range(300):
        wishes = recipe.world.Wishes(shallow=0.3, written=0.5)
        text = recipe.world.text_of(recipe.world.draw_story(np.random.default_rng(seed), wishes, kind))
        assert reader(text) == conclusions, text


def test_a_wrong_conclusion_is_seen():
    story = "There were three friends. Tom wrote to Joe. Joe wrote to Lucy. Lucy wrote to Tom."
    assert read_letters(f"{story} A letter from Tom, passed on twice, came to-- Joe-- Lucy.") == 1
    for wrong in ("passed on twice, came to Joe.", "passed on twice, came to-- Lucy-- Lucy."):
        with pytest.raises(AssertionError):
            read_letters(f"{story} A letter from Tom, {wrong}")
    sums = "It was a long day. Joe had one hat. Joe got two. Joe lost one. Then Joe had-- {}-- {} hats."
    assert read_sums(sums.format("three", "two")) == 1
    for wrong in (("two", "two"), ("three", "three")):
        with pytest.raises(AssertionError):
            read_sums(sums.format(*wrong))


def test_wishes_are_granted(recipe):
    world = recipe.world
    for kind in world.KINDS:
        pieces = [
            piece
            for seed in range(200)
            for piece in world.draw_story(np.random.default_rng(seed), world.Wishes(0.25, 0.0), kind)
        ]
        depths = np.array([piece.depth for piece in pieces if piece.part is world.Part.ANSWER])
        assert not any(piece.part is world.Part.STEPS for piece in pieces)
        assert 0.17 < (depths == 1).mean() < 0.33


def test_tokens_keep_the_text_and_know_the_answers(recipe):
    tokenizer = pyquiet.load("tiny-causal")[1]
    world, texts = recipe.world, recipe.texts

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    for seed in range(30):
        story = world.draw_story(np.random.default_rng(seed), world.Wishes())
        encoded = texts.encode_story(story, encode)
        assert encoded.ids == [*tokenizer(world.text_of(story)).input_ids, tokenizer.eos_token_id]
        answers = [(i, d) for i, p, d in zip(encoded.ids, encoded.parts, encoded.depths, strict=True) if d]
        wanted = [piece for piece in story if piece.part is world.Part.ANSWER]
        assert [(tokenizer.decode([i]), d) for i, d in answers] == [(piece.text, piece.depth) for piece in wanted]
    rows = texts.story_rows(0, 5, 4, 64, encode)
    assert rows.shape == (4, 64)
    assert (rows == texts.story_rows(0, 5, 4, 64, encode)).all()
    assert (rows != texts.story_rows(0, 6, 4, 64, encode)).any()


def test_training_reads_no_shipped_story(recipe, monkeypatch):
    stories = recipe.prepare.story_texts(5000.0)
    assert sum(map(len, stories[:-1])) < 5000 <= sum(map(len, stories))
    assert not set(stories) & {story["text"] for story in held_out("stories")}
    monkeypatch.setattr(recipe.prepare, "held_out", lambda kind: [{"text": stories[0]}, {"text": stories[2]}])
    assert recipe.prepare.story_texts(5000.0)[: len(stories) - 2] == [stories[1], *stories[3:]]


def test_shipped_stories_are_right_and_their_steps_unwritten():
    stories = held_out("stories")
    for kind, (reader, conclusions) in READERS.items():
        mine = [story["text"] for story in stories if story["kind"] == kind]
        assert len(mine) == 60
        assert all(reader(text) == conclusions and "--" not in text for text in mine)
    passages = held_out("passages")
    assert len({passage["text"] for passage in passages}) == 240
    assert len({passage["kind"] for passage in passages}) >= 20
    with pytest.raises(ValueError, match="'poems'"):
        held_out("poems")
