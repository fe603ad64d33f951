"""The table of diffusion: its numbers are those of `diffuse`, judge and n-grams; what equal quality takes, by hand."""

import math

import pytest
import torch

import pyquiet
from pyquiet.datasets import packed
from pyquiet.diffusion.ar_energy import AREnergy
from pyquiet.diffusion.modeling import MaskedDenoiser, backbone
from pyquiet.diffusion.sampling import diffuse
from pyquiet.evaluation import (
    DiffusionRow,
    DiffusionTable,
    Estimate,
    NGramModel,
    TextMetrics,
    diffusion_table,
    distinct_ngrams,
    judge_texts,
    ngram_variation,
)
from pyquiet.gaps import Codec

TEXT = "Once upon a time there was a king who had three sons. The youngest was called Simpleton, and so on. " * 5
LENGTH = 12


@pytest.fixture(scope="module")
def judge():
    return pyquiet.load("tiny-causal")


@pytest.fixture(scope="module")
def denoiser(judge):
    torch.manual_seed(0)
    V = len(judge[1]) + 1
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return MaskedDenoiser(backbone(V, mask_token_id=V - 1, **sizes).eval())


def table(denoiser, judge, **options):
    options = {"num_samples": 3, "length": LENGTH, "steps": [1, 3], "seed": 5, "progress": False} | options
    return diffusion_table(denoiser, judge[1], [TEXT], judge, **options)


def held_and_rest(judge, count=3):
    pieces = [row["input_ids"] for row in packed([TEXT], judge[1], LENGTH)]
    pieces = [piece for piece in pieces if len(piece) == LENGTH]
    held = [i * len(pieces) // count for i in range(count)]
    return [pieces[i] for i in held], [piece for i, piece in enumerate(pieces) if i not in held]


def assert_quality(row, tokens, judge, reference, symbols):
    texts = [Codec(judge[1]).decode(ids.tolist()) for ids in tokens]
    judged = judge_texts(judge, texts, tokens)
    for name, values in judged.columns().items():
        assert torch.allclose(row.values[name], values), name
    assert torch.allclose(row.values["ngram_nll"], NGramModel(symbols(reference), 2).nll(symbols(tokens)))
    for n in (1, 2, 3):
        assert row.variation[n] == ngram_variation(symbols(tokens), symbols(reference), n)
        assert torch.equal(row.values[f"distinct_{n}"], distinct_ngrams(symbols(tokens), n))


def test_the_rows_are_what_diffuse_gives(denoiser, judge, monkeypatch):
    calls = []

    def recorded(*arguments, **options):
        calls.append((arguments, options, diffuse(*arguments, **options)))
        return calls[-1][-1]

    monkeypatch.setattr("pyquiet.evaluation.diffusion.diffuse", recorded)
    energies = {"none": None, "ar": AREnergy(judge[0], mask_id=denoiser.mask_id)}
    options = {"candidates": 3, "samplers": ("schedule_first", "first_hitting"), "batch_size": 2}
    found = table(denoiser, judge, energies=energies, **options)
    methods = [(s, e) for s in options["samplers"] for e in energies]
    plan = [(s, e, k) for s, e in methods for k in ((1, 3) if s == "schedule_first" else (LENGTH,))]
    assert [(row.sampler, row.energy, row.steps) for row in found.rows[1:]] == plan
    assert len(calls) == len(methods) + 2 * len(plan)  # each gets warm, then two batches of three texts
    for number, ids in enumerate(([0, 1], [2])):
        first = len(methods) + number * len(plan)
        for (sampler, energy, k), (arguments, given, _) in zip(plan, calls[first : first + len(plan)], strict=True):
            assert arguments == (denoiser, energies[energy])
            assert (given["sampler"], given["steps"], given["length"]) == (sampler, k, LENGTH)
            assert (given["sequence_ids"].tolist(), given["seed"], given["candidates"]) == (ids, 5, 3)
    _, rest = held_and_rest(judge)
    for place, row in enumerate(found.rows[1:]):
        outs = [calls[len(methods) + number * len(plan) + place][2] for number in range(2)]
        tokens = torch.cat([out.tokens for out in outs])
        for name in ("denoiser_calls", "energy_passes", "depth", "ess"):
            assert row.values[name].tolist() == torch.cat([getattr(out, name) for out in outs]).tolist(), name
        assert row.values["seconds"].tolist() == [outs[0].seconds / 2, outs[0].seconds / 2, outs[1].seconds]
        assert_quality(row, tokens, judge, rest, lambda texts: [text.tolist() for text in texts])
        passes = row.values["denoiser_calls"] + row.values["energy_passes"]
        assert row.estimates()["passes"] == Estimate.of(passes)
    by_plan = dict(zip(plan, found.rows[1:], strict=True))
    assert by_plan["first_hitting", "none", LENGTH].values["denoiser_calls"].tolist() == [LENGTH] * 3
    assert (by_plan["schedule_first", "ar", 1].values["energy_passes"] == 3).all()
    assert (by_plan["schedule_first", "none", 1].values["energy_passes"] == 0).all()


@pytest.mark.parametrize("level", ["token", "character"])
def test_the_first_row_is_held_out_text_against_the_rest(denoiser, judge, level):
    def symbols(texts):
        rows = [text.tolist() for text in texts]
        return rows if level == "token" else [Codec(judge[1]).decode(row) for row in rows]

    held, rest = held_and_rest(judge)
    text = table(denoiser, judge, level=level, steps=[1]).rows[0]
    assert (text.method, text.steps) == ("text", None)
    assert_quality(text, torch.stack(held), judge, rest, symbols)
    assert "denoiser_calls" not in text.values


def test_texts_of_anyone_are_measured_as_the_held_out_ones_are(denoiser, judge):
    held, rest = held_and_rest(judge)
    row = table(denoiser, judge, steps=[1], order=3, add=0.5).rows[0]
    values, variation = TextMetrics(judge[1], judge, rest, order=3, add=0.5)(torch.stack(held))
    assert variation == row.variation
    assert values.keys() == row.values.keys()
    assert all(torch.equal(values[name], row.values[name]) for name in values)


def test_batches_change_nothing_but_seconds(denoiser, judge):
    energies = {"ar": AREnergy(judge[0], mask_id=denoiser.mask_id)}
    one, three = (table(denoiser, judge, energies=energies, batch_size=size) for size in (1, 3))
    for a, b in zip(one.rows, three.rows, strict=True):
        assert a.variation == b.variation
        assert torch.allclose(a.trace, b.trace, rtol=1e-4)
        for name in set(a.values) - {"seconds"}:
            assert torch.allclose(a.values[name], b.values[name], rtol=1e-4), name


def test_the_trace_is_the_mean_of_picks_by_time(denoiser, judge):
    energy = AREnergy(judge[0], mask_id=denoiser.mask_id)
    found = table(denoiser, judge, energies={"none": None, "ar": energy}, steps=[2, 2], candidates=4)
    assert found.rows[1].trace.shape == (0, 3)
    out = diffuse(denoiser, energy, length=LENGTH, num_samples=3, steps=2, candidates=4, seed=5)
    trace = out.trace
    assert found.rows[2].trace[:, 0].tolist() == [1.0, 0.5]
    for time, ess, picks in found.rows[2].trace.tolist():
        assert picks == (trace.times == time).sum()
        assert ess == pytest.approx(trace.ess[trace.times == time].mean().item(), rel=1e-4)


def test_perplexity_never_stands_without_entropy(denoiser, judge):
    found = table(denoiser, judge)
    quality, cost = str(found).split("\n\n")
    assert "gen. PPL" in quality
    for row, line in zip(found.rows, quality.split("\n")[1:], strict=True):
        estimates = row.estimates()
        assert estimates["perplexity"].mean == pytest.approx(row.values["perplexity"].log().mean().exp().item())
        for name in ("perplexity", "entropy_nats", "entropy_bits"):
            assert str(estimates[name]) in line
        assert estimates["entropy_bits"].mean == pytest.approx(estimates["entropy_nats"].mean / math.log(2))
    assert "gen. PPL" not in cost
    assert len({len(line) for line in quality.split("\n")}) == 1
    report = found.to_dict()
    assert (report["texts"], report["length"], report["level"]) == (3, LENGTH, "token")
    for row, line in zip(found.rows, report["rows"], strict=True):
        assert {"perplexity", "entropy_nats", "entropy_bits", "variation_3", "distinct_3"} <= set(line)
        assert line["ngram_nll"] == row.estimates()["ngram_nll"].to_dict()
    assert {"entropy_bits"} <= set(found.matched("perplexity").to_dict()["methods"]["schedule_first"])


def made(sampler, energy, steps, **values):
    columns = {name: torch.tensor([float(value)] * 2) for name, value in values.items()}
    names = ("perplexity", "ngram_nll", "entropy_bits", "denoiser_calls", "energy_passes", "depth", "seconds")
    zeros = {name: torch.full((2,), float(name == "perplexity")) for name in names}
    return DiffusionRow(
        sampler, energy, steps, zeros | columns, {n: Estimate(0.5 / (steps or 1), 0.1) for n in (1, 2, 3)}
    )


@pytest.fixture
def curves():
    """Rows out of order: plain ones at 4 and 16 steps, and with an energy at 2 and 8."""
    rows = [
        made("text", "none", None),
        made("s", "none", 16, ngram_nll=2.0, perplexity=10.0, entropy_bits=6, denoiser_calls=16, seconds=4.0, depth=16),
        made("s", "none", 4, ngram_nll=4.0, perplexity=1000.0, entropy_bits=8, denoiser_calls=4, seconds=1.0, depth=4),
        made("s", "ar", 2, ngram_nll=2.5, perplexity=90.0, denoiser_calls=2, energy_passes=16, seconds=3.0),
        made("s", "ar", 8, ngram_nll=1.5, perplexity=30.0, denoiser_calls=8, energy_passes=64, seconds=9.0),
    ]
    return DiffusionTable(rows, 5, "token")


def test_costs_at_equal_quality(curves):
    found = curves.matched("ngram_nll", 3.0)
    plain, ar = found.methods["s"], found.methods["s + ar"]
    assert plain["seconds"] == pytest.approx(2.0)  # half way from 1 to 4
    assert plain["denoiser_calls"] == pytest.approx(8.0)
    assert (plain["energy_passes"], plain["passes"]) == (0, pytest.approx(8.0))
    assert plain["entropy_bits"] == pytest.approx(7.0)
    assert (ar["seconds"], ar["passes"], found.at_most) == (3.0, 18.0, {"s + ar"})
    assert curves.matched("perplexity", 100.0).methods["s"]["seconds"] == pytest.approx(2.0)  # by its logarithm
    assert curves.matched("variation_2", 0.5 / 16).methods == {"s": pytest.approx(plain | {
        "entropy_bits": 6, "seconds": 4, "denoiser_calls": 16, "passes": 16, "depth": 16}), "s + ar": None}  # fmt: skip
    unreached = curves.matched("ngram_nll", 1.75)
    assert unreached.methods["s"] is None
    assert unreached.methods["s + ar"]["passes"] == pytest.approx((18 * 72**3) ** 0.25)
    assert curves.matched("ngram_nll", 2.0).methods["s"]["seconds"] == 4.0


def test_the_quality_that_all_reach_is_the_default(curves):
    assert curves.matched("ngram_nll").value == 2.0
    assert curves.matched("perplexity").value == pytest.approx(30)
    words = str(curves.matched("ngram_nll", 3.0)).split("\n")
    assert words[0].split("  ")[0].strip() == "at n-gram NLL 3"
    assert "<= 3" in words[2]
    assert "<=" not in words[1]
    assert "not reached" in str(curves.matched("ngram_nll", 1.75))
    with pytest.raises(ValueError, match="quality must be one of perplexity"):
        curves.matched("entropy_bits")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"num_samples": 1000}, "num_samples=1000"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps": [4, 0]}, "steps"),
        ({"length": 1}, "max_length"),
        ({"level": "word"}, "level"),
        ({"order": 0}, "n must be"),
        ({"add": 0.0}, "add"),
        ({"samplers": ("best",)}, "sampler"),
        ({"candidates": 0}, "candidates"),
    ],
)
def test_options_out_of_range(denoiser, judge, options, named):
    with pytest.raises(ValueError, match=named):
        table(denoiser, judge, **options)
