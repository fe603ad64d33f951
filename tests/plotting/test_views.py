"""Views of infilling and diffusion, read back from their markup."""

from __future__ import annotations

import re
from html import unescape

import pytest
import torch

import pyquiet
from pyquiet.any_subset import Origin
from pyquiet.plotting import Section, View, film_view, infilling_view, write_page
from pyquiet.plotting.page import MASKED


def lines_of(markup: str, kind: str) -> list[str]:
    """The markup of each text."""
    return re.findall(rf'<div class="{kind}">(.*?)</div>', markup, re.DOTALL)


def words_of(markup: str) -> str:
    return unescape(re.sub(r"<del>.*?</del>|<[^>]*>", "", markup, flags=re.DOTALL))


@pytest.fixture(scope="module")
def infilled():
    model, tokenizer = pyquiet.load("tiny-any-subset")
    ids = tokenizer("Once upon a time there was a little girl who lived in a wood.", return_tensors="pt").input_ids
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 3:14] = True
    return pyquiet.infill(model, ids, mask=mask, method="assd", k=4, seed=2), tokenizer


def test_infilling_is_shown_round_by_round(infilled):
    out, tokenizer = infilled
    lines = lines_of(infilling_view(out, tokenizer).markup, "text")
    assert len(lines) == int(out.rounds[0])
    for number, line in enumerate(lines):
        later = int((out.reveal_round > number).sum())
        assert line.count(MASKED) == later
        for origin in list(Origin)[1:]:
            now = (out.reveal_round == number) & (out.origin == origin)
            assert line.count(f'class="o{origin:d}') == int(now.sum())
        assert line.count("<del>") == int(((out.reveal_round == number) & (out.refused >= 0)).sum())
    assert words_of(lines[-1]) == tokenizer.decode(out.tokens[0], skip_special_tokens=True)


def test_what_earlier_rounds_filled_in_is_told_from_what_was_given(infilled):
    out, tokenizer = infilled
    for number, line in enumerate(lines_of(infilling_view(out, tokenizer).markup, "text")):
        assert line.count('class="was"') == int(((out.reveal_round >= 0) & (out.reveal_round < number)).sum())


def test_the_refused_draft_is_struck_out(infilled):
    out, tokenizer = infilled
    struck = re.findall("<del>(.*?)</del>", infilling_view(out, tokenizer).markup, re.DOTALL)
    refused = out.refused[out.refused >= 0].tolist()
    assert refused
    assert sorted(map(unescape, struck)) == sorted(tokenizer.decode([token]) for token in refused)


def test_a_film_has_a_frame_a_step():
    model, tokenizer = pyquiet.load("tiny-denoiser")
    denoiser = pyquiet.MaskedDenoiser(model, tokenizer.mask_token_id)
    out = pyquiet.diffuse(
        denoiser, lambda x, *_: torch.zeros(x.shape[:2]), length=12, num_samples=2, steps=5, candidates=4, seed=1
    )
    markup = film_view(out, tokenizer, row=1).markup
    frames, steps = lines_of(markup, "text"), out.reveal_step[1].unique().tolist()
    assert len(frames) == len(steps)
    for frame, step in zip(frames, steps, strict=True):
        assert frame.count(MASKED) == int((out.reveal_step[1] > step).sum())
        assert len(re.findall('class="new', frame)) == int((out.reveal_step[1] == step).sum())
    assert words_of(frames[-1]) == tokenizer.decode(out.tokens[1])
    assert markup.count("ESS 4.0 of 4") == len(steps)  # an energy of zero weighs all alike
    assert "width:100%" in markup


def test_a_step_that_was_not_corrected_says_so():
    model, tokenizer = pyquiet.load("tiny-denoiser")
    out = pyquiet.diffuse(pyquiet.MaskedDenoiser(model, tokenizer.mask_token_id), length=8, steps=3, seed=1)
    markup = film_view(out, tokenizer).markup
    assert 'class="ess"' not in markup
    assert markup.count("drawn as it is") == len(lines_of(markup, "text"))


def test_a_page_holds_its_sections_once_and_each_style_once(tmp_path):
    view = View("<b>seen</b>", ".seen{color:red}")
    path = tmp_path / "page.html"
    write_page(path, "<title>", [Section("One & two", ("a < b",), (view, view)), Section("More")], words="lead")
    text = path.read_text(encoding="utf-8")
    assert text.count(".seen{color:red}") == 1
    assert text.count("<b>seen</b>") == 2
    assert [unescape(x) for x in re.findall("<h2>(.*?)</h2>", text)] == ["One & two", "More"]
    assert "<p>a &lt; b</p>" in text
    assert "<h1>&lt;title&gt;</h1>" in text
    assert "<p>lead</p>" in text
    assert list(tmp_path.iterdir()) == [path]
