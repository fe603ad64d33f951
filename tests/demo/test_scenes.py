"""The demonstration's scenes on the embedded models: what they say is what they measured."""

from __future__ import annotations

import math

import pytest
import torch

import pyquiet
from pyquiet import demo
from pyquiet.demo import infilling, scenes, thoughts
from pyquiet.demo.scene import Scene, lower
from pyquiet.evaluation import Estimate, TokenGains
from pyquiet.plotting import View


def test_an_unknown_scene_is_refused_before_any_is_played(monkeypatch):
    monkeypatch.setattr(scenes, "import_module", lambda name: pytest.fail(f"{name} was played"))
    with pytest.raises(ValueError, match="'chess'"):
        demo.play(["infilling", "chess"])


def test_scenes_are_played_in_the_order_asked_for(monkeypatch):
    class Played:
        def __init__(self, name):
            self.name = name

        def show(self, seed, progress):
            return Scene(
                self.name, "shows", f"found {seed}", ("more",), {"nan": float("nan")}, lambda: (View("<b></b>"),), ()
            )

    monkeypatch.setattr(scenes, "import_module", Played)
    played = list(demo.play(["scaling", "thoughts"], seed=3, progress=False))
    assert [(name, scene.title, scene.found) for name, scene, _ in played] == [
        ("scaling", "pyquiet.demo.scaling", "found 3"),
        ("thoughts", "pyquiet.demo.thoughts", "found 3"),
    ]
    assert played[0][1].to_dict()["numbers"] == {"nan": None}  # JSON has no NaN
    section = played[0][1].section()
    assert (section.words, section.found, section.more) == (("shows",), "found 3", ("more",))


def test_every_scene_can_be_imported_by_its_name():
    for name in demo.SCENES:
        assert callable(scenes.import_module(f"pyquiet.demo.{name}").show)


def test_infilling_tells_calls_and_sameness_as_they_are(monkeypatch):
    scene = infilling.show(0, False)
    calls = scene.numbers["calls_per_token"]
    assert calls["sequential"] == 1
    assert calls["one_call"] < calls["assd"] < 1
    assert scene.numbers["same_texts"]
    assert scene.numbers["joint_gap"] < 1e-3
    assert "the texts are the same" in scene.found

    def without_coupling(*args, coupling, **options):
        return true_infill(*args, coupling="rejection", **options)

    true_infill = pyquiet.infill
    monkeypatch.setattr(pyquiet, "infill", without_coupling)
    other = infilling.show(0, False)
    assert not other.numbers["same_texts"]
    assert "NOT the same" in other.found


def test_infilling_takes_one_thread_and_gives_the_others_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with infilling._one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_gain_is_said_to_be_chance_below_two_errors():
    assert lower(Estimate(0.5, 0.2)) == "0.500 +- 0.200 lower"
    assert lower(Estimate(-0.5, 0.2)) == "0.500 +- 0.200 higher"
    assert lower(Estimate(0.3, 0.2)) == "0.300 +- 0.200 lower, which may be chance"


def test_the_error_of_a_gain_takes_texts_as_independent():
    row = torch.tensor([0, 0, 0, 2, 2, 5])
    zero, mixed = torch.zeros(6), -torch.tensor([1.0, 1, 1, 2, 2, 9])
    gains = TokenGains(row, row, row, zero, mixed, zero, row[:, None, None], zero[:, None])
    here = thoughts.mean_gain(gains, row < 5)
    assert here.mean == pytest.approx(7 / 5)
    assert here.error == pytest.approx(0.5)  # without the first text 2, without the second 1
    assert math.isnan(thoughts.mean_gain(gains, row == 5).error)  # of one text nothing is known


def test_next_token_losses_are_those_of_each_text_alone():
    model, tokenizer = pyquiet.load("tiny-causal")
    rows = [tokenizer(text).input_ids for text in ("Once upon a time there was a king.", "The door", "He said no.")]
    together = thoughts.next_token_nll(model, rows)
    alone = []
    for row in rows:
        ids = torch.tensor([row])
        alone.append(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    torch.testing.assert_close(together, torch.cat(alone).detach(), rtol=1e-4, atol=1e-4)
