"""The page of a text, read back by an HTML parser."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from transformers import AutoTokenizer

from pyquiet.plotting import write_thoughts_page
from pyquiet.plotting.pieces import token_pieces, visible
from pyquiet.plotting.thoughts import LEVELS

from .conftest import TEXT

VOID = {"meta", "hr", "br"}


class Page(HTMLParser):
    """Spans of the text by id, table rows, all tags and everything that is not markup."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.spans, self.rows, self.words, self.breaks = [], [], {}, [], "", []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "hr":
            self.breaks.append(len(self.spans))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "span":
            self.span = dict(attributes)
            self.spans[self.span["id"]] = (self.span, "")
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "span" in self.open:
            attributes, text = self.spans[self.span["id"]]
            self.spans[self.span["id"]] = (attributes, text + data)
        elif "td" in self.open:
            self.rows[-1][-1] += data
        elif "style" not in self.open:
            self.words += data


@pytest.fixture
def page(gains, tokenizer, tmp_path):
    def make(gains=gains, **options):
        path = tmp_path / "page.html"
        write_thoughts_page(gains, tokenizer, path, **options)
        assert list(tmp_path.iterdir()) == [path]
        return Page(path.read_text(encoding="utf-8"))

    return make


def whole_characters(pieces):
    return "".join(piece for piece in pieces if not re.fullmatch(r"\[[0-9A-F ]+\]", piece))


def test_the_text_can_be_read_back(page, gains):
    spans = list(page().spans.values())
    assert len(spans) == len(gains.token)
    text = whole_characters([text for _, text in spans])
    assert text == TEXT.replace("\r", "\u240d").replace("\0", "\u2400")
    assert page().breaks == [11]  # where the second row begins
    assert [bool(re.search(r"\bn\b", mark.get("class", ""))) for mark, _ in spans] == ["\n" in t for _, t in spans]


def test_every_token_tells_its_probabilities_and_thoughts(page, gains):
    for i, (attributes, _) in enumerate(page().spans.values()):
        assert attributes["id"] == f"t{i}"
        before_after, numbers, *thoughts = attributes["data-hint"].split("\n")
        base, mixed = (-gains.base_nll[i]).exp(), (-gains.mixed_nll[i]).exp()
        assert before_after == f"probability {base:.3g} without the thought, {mixed:.3g} with it"
        assert numbers == f"gain {gains.gain[i]:+.3f} nats, entropy {gains.entropy[i]:.2f} nats"
        assert thoughts == [f'thought, weight {w:+.3f}: <i> & "' for w in gains.weight[i].tolist()]


def test_colours_tell_gain_from_loss(page, gains):
    for i, (attributes, _) in enumerate(page().spans.values()):
        gain = gains.gain[i].item()
        level = len([least for least in LEVELS if abs(gain) >= least])
        colours = [name for name in attributes.get("class", "").split() if name != "n"]
        assert colours == ([("g" if gain > 0 else "l") + str(level)] if level else [])
        assert attributes["tabindex"] == ("0" if level >= 3 else "-1")  # a thousand stops would be too many
    assert "class" not in page().spans["t3"][0]  # 0.001 nats


def test_the_table_is_sorted_by_gain(page, gains):
    rows = page().rows[1:]  # below the head
    order = sorted(range(len(gains.token)), key=lambda i: (-gains.gain[i].item(), i))
    spans = page().spans
    assert [int(row[1]) for row in rows] == order
    for i, row in zip(order, rows, strict=True):
        assert row[0] == spans[f"t{i}"][1]
        base, mixed = (-gains.base_nll[i]).exp(), (-gains.mixed_nll[i]).exp()
        assert row[2:6] == [f"{gains.gain[i]:+.3f}", f"{base:.3g}", f"{mixed:.3g}", f"{gains.entropy[i]:.2f}"]
        assert row[6] == spans[f"t{i}"][0]["data-hint"].split("\n", 2)[2]


def test_it_needs_no_other_file_and_no_script(page):
    for tag, attributes in page(title='<script src="x">').tags:
        assert tag not in ("script", "link", "img", "iframe")
        assert not any(name == "src" or name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    assert '<script src="x">' in page(title='<script src="x">').words


def test_the_limit_is_stated(page, gains):
    shown = page(limit=4)
    assert list(shown.spans) == ["t0", "t1", "t2", "t3"]
    assert len(shown.rows) == 1 + 4
    assert f"The first 4 of {len(gains.token)} tokens" in shown.words
    assert f"{len(gains.token)} tokens. Point" in page().words
    assert str(gains.table("entropy")) in shown.words
    assert str(gains.table("loss")) in page(by="loss").words
    with pytest.raises(ValueError, match="limit"):
        page(limit=0)


def test_thoughts_of_no_tokens_are_shown(page, gains):
    empty = replace(gains, thoughts=gains.thoughts[:, :, :0])
    assert page(empty).spans["t0"][0]["data-hint"].split("\n")[2:] == [
        f"thought, weight {w:+.3f}: " for w in gains.weight[0].tolist()
    ]


def test_characters_of_several_tokens_stand_with_the_last(tokenizer):
    def pieces(text):
        return token_pieces(tokenizer, tokenizer(text, add_special_tokens=False).input_ids)

    assert pieces("Ü") == ["[C3]", "Ü"]
    assert pieces("a…b") == ["a", "[E2]", "[80]", "…", "b"]
    assert pieces(" \U0001f600!")[-5:] == ["[F0]", "[9F]", "[98]", "\U0001f600", "!"]
    euro = tokenizer("€", add_special_tokens=False).input_ids
    x = tokenizer("x", add_special_tokens=False).input_ids
    assert token_pieces(tokenizer, euro[:2]) == ["[E2]", "[82]"]  # cut short
    assert token_pieces(tokenizer, [*euro[1:], *x]) == ["[82]", "[AC]", "x"]
    assert token_pieces(tokenizer, [*euro[:1], *x, *euro]) == ["[E2]", "x", "[E2]", "[82]", "€"]
    assert token_pieces(tokenizer, []) == []


def test_pieces_of_sentencepiece_keep_their_spaces(shared):
    folder = shared / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The cat ก sat\n", add_special_tokens=False).input_ids
    pieces = token_pieces(tokenizer, ids)
    assert "[<0xE0>]" in pieces
    assert "".join(piece for piece in pieces if not piece.startswith("[<")) == " The cat ก sat\n"


def test_control_characters_become_visible():
    assert visible("a\0\r\x1b\x7f\t\n") == "a\u2400\u240d\u241b\u2421\t\n"


def test_many_thousands_of_tokens(page, gains):
    many = replace(
        gains,
        **{name: torch.cat([getattr(gains, name)] * 130) for name in gains.__dataclass_fields__},
    )
    assert len(page(many, limit=100_000).spans) == len(many.token) > 5000
    assert len(page(many).spans) == 5000
