"""The table of methods: its numbers are those of `infill`, of the judge and of the histogram."""

import math

import pytest
import torch

import pyquiet
from pyquiet.datasets import packed
from pyquiet.evaluation import generative_table, judge_texts
from pyquiet.gaps import Codec

from ..any_subset.models import random_xlnet

TEXT = (
    "Once upon a time there was a king who had three sons. The youngest of them was called Simpleton, and so on. " * 6
)
LENGTH = 20


@pytest.fixture(scope="module")
def judge():
    return pyquiet.load("tiny-causal")


@pytest.fixture(scope="module")
def model(judge):
    return random_xlnet(vocabulary=len(judge[1]))


def table(model, judge, **options):
    options = {"limit": 3, "length": LENGTH, "prompt_fraction": 0.25, "seed": 5, "progress": False} | options
    return generative_table(model, judge[1], [TEXT], judge, **options)


def test_the_rows_are_what_infill_gives(model, judge, monkeypatch):
    calls = []

    def recorded(*arguments, **options):
        calls.append((arguments[1].clone(), options["mask"].clone(), options, pyquiet.infill(*arguments, **options)))
        return calls[-1][-1]

    monkeypatch.setattr("pyquiet.evaluation.generative.infill", recorded)
    methods = ("sequential", "assd", "one_call", "ngram")
    found = table(model, judge, methods=methods, temperature=0.9)
    assert [options["method"] for *_, options, _ in calls] == [*methods] * 4  # to get warm, then a text each
    assert [options["k"] for *_, options, _ in calls] == ["auto", 5, 2, 5] * 4
    pieces = [row["input_ids"] for row in packed([TEXT], judge[1], LENGTH)]
    whole = [piece for piece in pieces if len(piece) == LENGTH]
    timed, codec = calls[4:], Codec(judge[1])
    masks = []
    for number in range(3):
        four = timed[4 * number : 4 * number + 4]
        for ids, mask, options, _ in four:
            assert torch.equal(ids[0], whole[number * len(whole) // 3])
            assert torch.equal(mask, four[0][1])
            assert int(mask.sum()) == 15
            assert (options["seed"], options["sequence_ids"].tolist(), options["temperature"]) == (5, [number], 0.9)
            assert options["banned"].nonzero().flatten().tolist() == [0, 1, 2]
        masks.append(tuple(four[0][1][0].tolist()))
    assert len(set(masks)) == 3
    for at, method in enumerate(methods):
        outs, row = [call[3] for call in timed[at::4]], found.rows[method]
        assert row["target_calls"].tolist() == [int(out.calls["density"]) for out in outs]
        assert row["draft_calls"].tolist() == [int(out.calls["draft"]) for out in outs]
        assert row["auxiliary_calls"].tolist() == [int(out.drafter_calls) for out in outs]
        assert row["tokens_per_round"].tolist() == [15 / int(out.rounds) for out in outs]
        assert row["seconds"].tolist() == [out.seconds for out in outs]
        written = [codec.decode(out.tokens[0].tolist()) for out in outs]
        for name, values in judge_texts(judge, written, [out.tokens[0] for out in outs]).columns().items():
            assert torch.allclose(row[name], values), name
    assert (found.rows["ngram"]["auxiliary_calls"] > 0).all()
    assert found.rows["sequential"]["target_calls"].tolist() == [15.0] * 3


def test_batches_change_nothing_but_seconds(model, judge):
    methods = ("sequential", "assd")
    one, three = (table(model, judge, methods=methods, batch_size=size, k=3) for size in (1, 3))
    for method in methods:
        for name in set(one.rows[method]) - {"seconds"}:
            assert torch.allclose(one.rows[method][name], three.rows[method][name]), (method, name)
        assert three.rows[method]["seconds"].unique().numel() == 1


def test_the_printed_table_and_json(model, judge):
    found = table(model, judge, methods=("assd", "assd"), k=3)  # the second one adds nothing
    head, row = str(found).split("\n")
    assert len(head) == len(row)
    estimate = found.estimates()["assd"]["target_calls"]
    values = found.rows["assd"]["target_calls"]
    assert estimate.mean == pytest.approx(values.mean().item())
    assert estimate.error == pytest.approx(values.std().item() / math.sqrt(3))
    assert str(estimate) in row
    report = found.to_dict()
    assert (report["texts"], report["length"], report["filled"]) == (3, LENGTH, 15)
    assert report["methods"]["assd"]["target_calls"]["mean"] == estimate.mean


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 1000}, "limit=1000"),
        ({"batch_size": 0}, "batch_size"),
        ({"prompt_fraction": 1.0}, "prompt_fraction"),
        ({"length": 1}, "max_length"),
        ({"methods": ("best",)}, "method"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_options_out_of_range(model, judge, options, named):
    with pytest.raises(ValueError, match=named):
        table(model, judge, **options)
