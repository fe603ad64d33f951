"""The embedded any-subset model is small, fills gaps with sense, drafts well and is as good as its card says."""

import random
import re
from pathlib import Path

import pytest
import torch

import pyquiet
from pyquiet import zoo
from pyquiet.any_subset.training import random_order, subset_scores
from pyquiet.datasets import packed

FOLDER = Path(zoo.__file__).parent / "tiny-any-subset"
RECIPE = Path(__file__).parents[2] / "recipes" / "tiny_any_subset"
GAPS = [
    ("He did not know what", " do.", " to"),
    ("She looked", " him and said nothing.", " at"),
    ('"I am very glad', ' see you," said the old man.', " to"),
]


@pytest.fixture(scope="module")
def loaded():
    return pyquiet.load("tiny-any-subset")


def test_its_tokens_are_those_of_the_causal_model(loaded):
    assert loaded[1].get_vocab() == pyquiet.load("tiny-causal")[1].get_vocab()


@pytest.mark.parametrize(("before", "behind", "between"), GAPS, ids=[gap[2] for gap in GAPS])
def test_it_reads_on_both_sides_of_a_gap(loaded, before, behind, between):
    model, tokenizer = loaded
    ids = [*tokenizer(before).input_ids, 0, *tokenizer(behind, add_special_tokens=False).input_ids]
    mask = torch.zeros(1, len(ids), dtype=torch.bool)
    mask[0, len(tokenizer(before).input_ids)] = True
    out = pyquiet.infill(model, torch.tensor([ids]), mask=mask, temperature=0)
    assert tokenizer.decode(out.tokens[mask]) == between


def test_its_drafts_save_calls(loaded):
    """One text of 47 tokens, every second given, thirty times: about half the calls of filling one by one."""
    model, tokenizer = loaded
    text = "Once upon a time there was a king who had three daughters, and the youngest was so beautiful that the sun"
    ids = torch.tensor([tokenizer(f"{text} himself wondered whenever it shone in her face.").input_ids]).expand(30, -1)
    mask = (torch.arange(ids.shape[1]) % 2 == 1).expand(30, -1)
    out = pyquiet.infill(model, ids, mask=mask, method="one_call", k=4, seed=0)
    assert sum(int(x.sum()) for x in out.calls.values()) / int(mask.sum()) <= 0.6


@torch.no_grad()
def test_the_stated_scores_are_reproduced(loaded, shared, monkeypatch):
    """On every eighth of the held-out texts."""
    books = shared / "data" / "text" / "gutenberg"
    if not (RECIPE.is_dir() and books.is_dir()):
        pytest.skip(f"no {RECIPE} or no {books}")
    monkeypatch.syspath_prepend(RECIPE)

    import prepare

    model, tokenizer = loaded
    sections = [section for book in prepare.read_books(books) for section in book.held_out]
    lengths = random.Random(1)
    documents = [text for section in sections for text in prepare.documents(section, lengths)]
    texts = torch.stack([x["input_ids"] for x in packed(documents, tokenizer, 128)[:-1]])
    for rate, limit in ((0.5, 0.03), (0.95, 0.03)):
        order, prompt = random_order(
            torch.full((len(texts),), rate), texts, seed=0, sequence_ids=torch.arange(len(texts))
        )
        scores = subset_scores(model, texts[::8], order=order[::8], prompt=prompt[::8])
        row = re.search(rf"^\| {rate:.0%} \| \d+ \| ([\d.]+) \| ([\d.]+) ", (FOLDER / "README.md").read_text(), re.M)
        assert row
        assert (scores.joint_nll.sum() / scores.targets.sum()).item() == pytest.approx(float(row[1]), rel=limit)
        accepted = scores.acceptance[:, 0].sum() / scores.drafts[:, 0].sum()
        assert accepted.item() == pytest.approx(float(row[2]), rel=limit)
