"""`pyquiet demo`: what it prints, writes and refuses; the scenes themselves are tested in tests/demo."""

import importlib.util
import json
import re

import pytest

from pyquiet.cli import main
from pyquiet.demo import SCENES, Scene, scenes
from pyquiet.environment import fingerprint
from pyquiet.plotting import View
from pyquiet.zoo import load

from .one_line import error_line


class Played:
    """A scene's module."""

    def __init__(self, name):
        self.name = name.rpartition(".")[2]

    def show(self, seed, progress):
        view = View(f"<b>picture of {self.name}</b>")
        numbers = {"seed": seed, "progress": progress}
        words = f"Title of {self.name}", "It shows.", f"found {seed}", ("It adds.",)
        return Scene(*words, numbers, lambda: (view,), ("tiny-draft",))


@pytest.fixture
def played(monkeypatch):
    monkeypatch.setattr(scenes, "import_module", Played)


def test_every_scene_is_told_in_its_order(played, capsys):
    assert main(["demo", "--seed", "7"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"Title of (\w+)\n  It shows\.\n  > found 7\n    It adds\.\n", out) == list(scenes.SCENES)
    assert " s in all" in out


def test_lines_are_no_wider_than_the_terminal(played, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr(
        Played, "show", lambda self, *_: Scene("T", "word " * 60, "word " * 60, ("word " * 60,), {}, tuple, ())
    )
    assert main(["demo", "--only", "scaling"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) in range(40, 51)


def test_on_standard_output_json_stands_alone(played, capsys):
    assert main(["demo", "--only", "scaling", "thoughts", "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["scenes"]) == ["scaling", "thoughts"]
    assert report["scenes"]["thoughts"]["numbers"] == {"seed": 0, "progress": False}
    assert report["environment"]["command"] == "pyquiet demo"
    assert list(report["environment"]["models"]) == ["tiny-draft"]
    assert report["environment"]["models"]["tiny-draft"]["fingerprint"] == fingerprint(load("tiny-draft")[0])


def test_a_page_has_every_view_and_says_what_it_is(played, capsys, tmp_path):
    page = tmp_path / "demo.html"
    assert main(["demo", "--only", "infilling", "bilevel", "--html", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"picture of (\w+)", text) == ["infilling", "bilevel"]
    assert '<p class="number">found 0</p>' in text
    assert "<li>It adds.</li>" in text
    assert " Seed 0.</p>" in text
    assert str(page) in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--html", "--json"])
def test_what_cannot_be_written_is_told_before_anything_is_played(monkeypatch, capsys, option):
    monkeypatch.setattr(scenes, "import_module", lambda name: pytest.fail("played"))
    assert main(["demo", option, "/no/folder/file"]) == 2
    assert "there is no folder /no/folder" in error_line(capsys)


def test_there_are_no_other_scenes(capsys):
    assert main(["demo", "--only", "chess"]) == 2
    assert error_line(capsys) == f"pyquiet: error: --only must be one of {', '.join(SCENES)}, got 'chess'"


def test_no_scene_is_played_twice(played, capsys):
    assert main(["demo", "--only", "scaling", "diffusion", "scaling"]) == 0
    assert re.findall(r"Title of (\w+)", capsys.readouterr().out) == ["scaling", "diffusion"]


def test_matplotlib_is_needed_for_figures_alone(played, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    page = str(tmp_path / "page.html")
    assert main(["demo", "--only", "infilling", "diffusion", "--html", page]) == 0
    capsys.readouterr()
    assert main(["demo", "--only", "infilling", "scaling", "--html", page]) == 2
    assert 'pip install "pyquiet[plot]"' in error_line(capsys)
