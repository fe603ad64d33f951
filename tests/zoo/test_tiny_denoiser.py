"""The embedded denoiser and energy share the causal model's tokens and are as good as their cards say."""

import random
import re
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import pyquiet
from pyquiet import zoo
from pyquiet.datasets import packed

NAMES = ("tiny-denoiser", "tiny-energy")
ZOO = Path(zoo.__file__).parent
RECIPES = Path(__file__).parents[2] / "recipes"
GAPS = [
    ("She looked", " him and said nothing.", " at"),
    ('"I am very glad', ' see you," said the old man.', " to"),
    ("It was one of", " most beautiful things that he had ever seen.", " the"),
    ("He took it out of", " pocket.", " his"),
    ("He was as good", " his word.", " as"),
    ("She had never", " him before.", " seen"),
]


@pytest.fixture(scope="module")
def loaded():
    return {name: pyquiet.load(name) for name in NAMES}


def test_their_tokens_are_those_of_the_causal_model(loaded):
    """And the mask behind them, so that it can be an energy for the denoiser."""
    causal = pyquiet.load("tiny-causal")[1]
    for name in NAMES:
        model, tokenizer = loaded[name]
        assert tokenizer.get_vocab() == {**causal.get_vocab(), "<mask>": 2048}
        assert tokenizer.mask_token_id == model.config.mask_token_id == 2048
        assert tokenizer("The king's caf\u00e9").input_ids == causal("The king's caf\u00e9").input_ids


@pytest.mark.parametrize(("before", "behind", "between"), GAPS, ids=[gap[2] for gap in GAPS])
def test_the_denoiser_reads_on_both_sides_of_a_gap(loaded, before, behind, between):
    model, tokenizer = loaded["tiny-denoiser"]
    ids = tokenizer(f"{before}<mask>{behind}", return_tensors="pt").input_ids
    law = pyquiet.MaskedDenoiser(model).log_probs(ids)
    assert law.shape == (1, 2049)
    assert law[0, 2048] == -torch.inf
    assert tokenizer.decode(law.argmax(-1)) == between


def test_the_energy_prefers_a_text_to_its_words_in_another_order(loaded):
    """The first words given, the rest to be judged; the denoiser's law of each position is the same for both."""
    model, tokenizer = loaded["tiny-energy"]
    right = 0
    sentences = [
        "He was going to the village, and the old man was with him.",
        "She had never seen such a beautiful garden in all her life.",
        "He took the letter from the table and began to read it to her.",
        "I should be very glad to see you again, my dear friend.",
        "There was a great noise in the street, and they ran to the window.",
        "It was so dark that he could not see the road before him.",
    ]
    for number, sentence in enumerate(sentences):
        ids = tokenizer(sentence, return_tensors="pt").input_ids
        order = torch.randperm(ids.shape[1] - 2, generator=torch.Generator().manual_seed(number)) + 1
        other = torch.cat([ids[:, :1], ids[:, order], ids[:, -1:]], 1)
        noisy = ids.clone()
        noisy[:, 1:-1] = 2048
        found = model(torch.stack([ids, other], 1), noisy, torch.ones(1, dtype=torch.float64))
        right += int(found[0, 0] < found[0, 1])
    assert right >= 5


@pytest.fixture
def recipe(monkeypatch):
    if not RECIPES.is_dir():
        pytest.skip(f"no recipes in {RECIPES}")
    monkeypatch.syspath_prepend(RECIPES / "tiny_any_subset")
    monkeypatch.syspath_prepend(RECIPES / "tiny_denoiser")


@pytest.fixture
def texts(recipe, shared, loaded):
    """The held-out texts of the card."""
    books = shared / "data" / "text" / "gutenberg"
    if not books.is_dir():
        pytest.skip(f"no {books}")
    import prepare

    lengths = random.Random(1)
    sections = [section for book in prepare.read_books(books) for section in book.held_out]
    documents = [text for section in sections for text in prepare.documents(section, lengths, (200.0, 2200.0))]
    pieces = packed(documents, loaded["tiny-denoiser"][1], 128, across=False)
    return torch.stack([piece["input_ids"] for piece in pieces if len(piece["input_ids"]) == 128])


def stated(name, row):
    found = re.search(row, (ZOO / name / "README.md").read_text(), re.M)
    assert found, f"the card of {name} has no {row}"
    return [float(x) for x in found.groups()]


def test_the_stated_bound_is_reproduced(loaded, texts):
    """On every eighth of the held-out texts, by one draw of noise instead of four."""
    import quality

    denoiser = pyquiet.MaskedDenoiser(loaded["tiny-denoiser"][0])
    (expected,) = stated("tiny-denoiser", r"NELBO \*\*([\d.]+)\*\*")
    found, error = quality.bound(denoiser, texts[::8], draws=1)
    assert abs(found - expected) < 3 * error
    assert error < 0.16
    rate, tokens = quality.masked_nll(denoiser, texts[::8], 0.5)
    (half,) = stated("tiny-denoiser", r"^\| 50% \| \d+ \| ([\d.]+) \|")
    assert rate == pytest.approx(half, rel=0.03)
    assert tokens == 65 * len(texts[::8])


def test_it_knows_the_stories_as_well_as_stated(recipe, loaded):
    """On every sixth of those that come with the package, masked in other places."""
    import quality

    model, tokenizer = loaded["tiny-denoiser"]
    pieces = packed([row["text"] for row in zoo.held_out("stories")][::6], tokenizer, 128, across=False)
    stories = pad_sequence([piece["input_ids"] for piece in pieces], batch_first=True, padding_value=quality.PAD)
    found, tokens = quality.masked_nll(pyquiet.MaskedDenoiser(model), stories, 0.5)
    (expected,) = stated("tiny-denoiser", r"^\| 50% \| \d+ \| [\d.]+ \| ([\d.]+) \|")
    assert found == pytest.approx(expected, rel=0.2)
    assert tokens > 1000


@pytest.mark.parametrize(("time", "band"), [("0.1", 0.08), ("0.3", 0.03)])
def test_the_stated_judgement_is_reproduced(loaded, texts, time, band):
    """The energy is lower on real texts than on completions, as often as the card says."""
    import quality

    denoiser = pyquiet.MaskedDenoiser(loaded["tiny-denoiser"][0])
    right, area = stated("tiny-energy", rf"^\| {re.escape(time)} \| ([\d.]+)% \| ([\d.]+) \|")
    found = quality.energies(loaded["tiny-energy"][0], denoiser, texts[::8], float(time))
    assert found[:, 0].mean() < found[:, 1:].mean() - 1
    assert quality.share_right(found) == pytest.approx(right / 100, abs=band)
    assert quality.area_under_curve(found) == pytest.approx(area, abs=band)


def test_words_that_are_none_are_counted(recipe):
    import words

    assert words.share_unknown(["The cat sat.", "A zyx."], {"the", "cat", "sat", "a"}) == "20.0% +- 24.0% | 5"
    assert words.whole_words("ing of the wor") == " of the "
