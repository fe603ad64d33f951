"""`pyquiet diffuse` and `pyquiet evaluate diffusion` with small random models: what they print, and their errors."""

import json
import re

import pytest
import torch

import pyquiet
from pyquiet.cli import main
from pyquiet.diffusion import AREnergy, MaskedDenoiser, NCEEnergy, backbone
from pyquiet.diffusion.hooks import by_confidence
from pyquiet.diffusion.sampling import diffuse
from pyquiet.environment import fingerprint
from pyquiet.evaluation import diffusion_table
from pyquiet.gaps import Codec

from .one_line import error_line

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A denoiser with a tokenizer, trained energies with the same and with another mask, and a text."""
    folder = tmp_path_factory.mktemp("diffuse")
    lm, tokenizer = pyquiet.load("tiny-causal")
    V = len(tokenizer)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    torch.manual_seed(0)
    model = backbone(V + 1, mask_token_id=V, **SIZES)
    energy = NCEEnergy.from_denoiser(model)
    torch.nn.init.normal_(energy.head[-1].weight)
    other = NCEEnergy.from_denoiser(MaskedDenoiser(model, mask_id=7))
    for name, saved in (("denoiser", model), ("bare", model), ("energy", energy), ("other", other)):
        saved.save_pretrained(folder / name)
        if name != "bare":
            tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("Once upon a time there was a king who had three sons. " * 9)
    return folder


@pytest.fixture(scope="module")
def models(folder):
    """The denoiser, its tokenizer, and its energies by name."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "denoiser")
    denoiser = MaskedDenoiser(AutoModelForMaskedLM.from_pretrained(folder / "denoiser").eval())
    energies = {
        "none": None,
        "ar": AREnergy(pyquiet.load("tiny-causal")[0], mask_id=denoiser.mask_id),
        "trained": NCEEnergy.from_pretrained(folder / "energy").eval(),
    }
    return denoiser, tokenizer, energies


def run(folder, *arguments):
    arguments = [a.replace("DATA", str(folder)) for a in arguments]
    return main(["diffuse", "--model", str(folder / "denoiser"), *arguments])


def evaluate(folder, *arguments):
    arguments = [a.replace("DATA", str(folder)) for a in arguments]
    text = ["--text", str(folder / "text.txt"), "--quiet"]
    return main(["evaluate", "diffusion", "--model", str(folder / "denoiser"), *text, *arguments])


def expected(models, parts, lengths, energy="none", **options):
    """What `diffuse` makes of these parts around gaps, in parts, and its result."""
    denoiser, tokenizer, energies = models
    codec = Codec(tokenizer)
    text = codec.gapped(parts, [range(n, n + 1) for n in lengths], trim=True)
    ids, given = text.tokens(lengths, denoiser.mask_id)[None], text.given(lengths)
    banned = codec.banned(denoiser.vocab_size)
    options = {"temperature": 0.5, **options}
    out = diffuse(denoiser, energies[energy], input_ids=ids, mask=~given[None], banned=banned, **options)
    return [codec.parts(row, given.tolist()) for row in out.tokens.tolist()], out


def text_of(parts):
    return "".join(part for part, _ in parts)


def test_a_fresh_text_and_what_it_took(folder, models, capsys):
    assert run(folder, "--length", "9", "--steps", "4") == 0
    text, line = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    (parts,), out = expected(models, ["", ""], [9], steps=4)
    assert text == text_of(parts)
    assert line.startswith(
        f"9 tokens, {int(out.denoiser_calls)} denoiser calls, 0 energy passes, depth {int(out.depth)} (passes that "
    )
    assert "ESS" not in line
    assert re.search(r", \d+\.\d\d s$", line)


def test_a_prompt_is_continued_by_every_option(folder, models, capsys):
    words = {"--steps": 3, "--candidates": 5, "--window": 0.7, "--energy-temperature": 2.0, "--temperature": 0.9}
    words |= {"--top-k": 50, "--top-p": 0.9, "--seed": 7, "--sampler": "ancestral"}
    arguments = [str(word) for pair in words.items() for word in pair]
    options = {name[2:].replace("-", "_"): value for name, value in words.items()}
    assert run(folder, "--prompt", "The king ", "--length", "8", "--energy", "ar", *arguments) == 0
    text, line = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    (parts,), out = expected(models, ["The king", ""], [8], "ar", **options)
    assert text.startswith("The king")
    assert text.replace("[", "").replace("]", "") == text_of(parts)
    calls, passes = int(out.denoiser_calls), int(out.energy_passes)
    assert passes == 5 * int(out.trace.corrected.sum())
    assert line.startswith(
        f"8 tokens, {calls} denoiser calls, {passes} energy passes, depth {int(out.depth)} (passes that wait for one "
        f"another), ESS {float(out.ess):.2f} (that many of 5 candidates count), "
    )


def test_the_surest_tokens_may_open_first(folder, models, capsys):
    assert run(folder, "--length", "9", "--by-confidence", "4") == 0
    text = capsys.readouterr().out.split("\n")[0]
    (parts,), out = expected(models, ["", ""], [9], order=by_confidence(4))
    assert text == text_of(parts)
    assert int(out.denoiser_calls) == 3


def test_gaps_are_filled_and_samples_differ_as_json(folder, models, capsys):
    arguments = [
        "--text",
        "The ___ sat on the ___4___.",
        "--gap-tokens",
        "2",
        "--num-samples",
        "2",
        "--steps",
        "2",
        "--json",
    ]
    assert run(folder, *arguments, "--energy", "DATA/energy") == 0
    report = json.loads(capsys.readouterr().out)
    parts, out = expected(models, ["The ", " sat on the ", "."], [2, 4], "trained", steps=2, num_samples=2)
    assert [[(p["text"], p["filled"]) for p in sample["parts"]] for sample in report["samples"]] == parts
    assert [sample["text"] for sample in report["samples"]] == [text_of(p) for p in parts]
    for name in ("denoiser_calls", "energy_passes", "depth", "ess", "log_normalizer"):
        assert [s[name] for s in report["samples"]] == pytest.approx(getattr(out, name).tolist(), rel=1e-5), name
    assert (report["tokens"], report["seed"]) == (6, 0)
    assert report["samples"][0]["text"] != report["samples"][1]["text"]
    assert run(folder, *arguments, "--energy", "DATA/energy", "--seed", "1") == 0
    assert json.loads(capsys.readouterr().out)["samples"] != report["samples"]


def test_what_json_has_no_word_for_is_none(folder, monkeypatch, capsys):
    def changed(*arguments, **options):
        out = diffuse(*arguments, **options)
        out.ess[0] = torch.nan
        out.log_normalizer[0] = -torch.inf
        return out

    monkeypatch.setattr("pyquiet.diffusion.sampling.diffuse", changed)
    assert run(folder, "--length", "3", "--steps", "1", "--json") == 0
    sample = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["samples"][0]
    assert (sample["ess"], sample["log_normalizer"]) == (None, None)


def test_a_terminal_shows_the_text_filling_in(folder, models, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    arguments = ["--prompt", "The king", "--length", "6", "--steps", "3", "--seed", "2"]
    assert run(folder, *arguments) == 0
    shown = capsys.readouterr().out
    seen = []
    expected(models, ["The king", ""], [6], steps=3, seed=2, on_step=lambda *step: seen.append(step))
    for step, time, tokens in seen:
        masked = int((tokens == models[0].mask_id).sum())
        found = re.search(rf"step {step + 1}, time {time:.2f}[^\n]*\n([^\n]*)", shown)
        assert found[1].count("\N{LIGHT SHADE}") == masked, step
        assert "The king" in found[1]
    assert {int((tokens == models[0].mask_id).sum()) > 0 for *_, tokens in seen} == {True, False}
    end = shown.rstrip("\n").split("\n")[-2:]
    for more in (["--quiet"], ["--json"]):
        assert run(folder, *arguments, *more) == 0
        out = capsys.readouterr().out
        assert "\N{LIGHT SHADE}" not in out
        assert "step 1" not in out
        if more == ["--quiet"]:
            text, line = out.rstrip("\n").split("\n")
            assert end[0].endswith(text)
            assert line.rsplit(",", 1)[0] == end[1].rsplit(",", 1)[0]


def test_new_tokens_stand_out_on_a_terminal_with_colours(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert run(folder, "--prompt", "The king", "--length", "6", "--steps", "3") == 0
    out = capsys.readouterr().out
    assert "\033[1;32m" in out  # opened in this step
    assert "\033[1m" in "\n".join(out.split("\n")[:-3])  # opened in a step before
    assert "\033[2m\N{LIGHT SHADE}" in out
    assert re.search("The king ?\033\\[1m", out.split("\n")[-3])


def test_another_folder_may_have_the_tokenizer(folder, capsys):
    arguments = ["--length", "5", "--steps", "2"]
    assert run(folder, *arguments) == 0
    text = capsys.readouterr().out.split("\n")[0]
    assert run(folder, *arguments, "--model", "DATA/bare", "--tokenizer", "DATA/denoiser") == 0
    assert capsys.readouterr().out.split("\n")[0] == text


def test_the_embedded_models_are_the_default(capsys):
    arguments = ["diffuse", "--prompt", "Once upon a time there was a", "--length", "6", "--steps", "3", "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--model", "tiny-denoiser", "--energy", "tiny-causal"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == report["samples"]
    assert (report["model"], report["energy"]) == ("tiny-denoiser", "ar")
    assert report["environment"]["models"]["energy"]["fingerprint"] == fingerprint(pyquiet.load("tiny-causal")[0])
    assert report["samples"][0]["text"].startswith("Once upon a time there was a")
    assert report["samples"][0]["energy_passes"] > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "/no/such/folder"], "--model /no/such/folder"),
        (["--model", "tiny-causal"], "no mask token"),
        (["--model", "DATA/energy"], "pyquiet_energy"),
        (["--model", "DATA/bare", "--tokenizer", "tiny-causal"], "no mask token"),
        (["--tokenizer", "/no/such/folder"], "--tokenizer /no/such/folder: no tokenizer there"),
        (["--energy", "/no/such/folder"], "--energy /no/such/folder"),
        (["--energy", "tiny-puzzler"], "tokenizers differ"),
        (["--energy", "DATA/other"], "its mask has the id 7"),
        (["--text", "no gap"], "no gap"),
        (["--text", "a ___2-3___"], "___2-3___"),
        (["--prompt", "\udce4"], "UTF-8"),
        (["--length", "0"], "--length"),
        (["--text", "a ___", "--length", "5"], "--length has no use with --text"),
        (["--prompt", "a", "--gap-tokens", "5"], "--gap-tokens has no use without --text"),
        (["--gap-tokens", "0"], "--gap-tokens"),
        (["--num-samples", "0"], "--num-samples"),
        (["--steps", "0"], "--steps"),
        (["--candidates", "0"], "--candidates must be at least 1, got 0"),
        (["--window", "2"], "--window must be in [0, 1], got 2"),
        (["--energy-temperature", "0"], "--energy-temperature must be above 0, got 0"),
        (["--ess-target", "0.5"], "--ess-target must be at least 1, got 0.5"),
        (["--by-confidence", "0"], "--by-confidence must be at least 1, got 0"),
        (
            ["--by-confidence", "2", "--sampler", "cached"],
            "--by-confidence decides what opens in a step, and so does --sampler cached",
        ),
        (
            ["--by-confidence", "2", "--steps", "64"],
            "--by-confidence decides what opens in a step, and so does --steps",
        ),
        (["--sampler", "best"], "--sampler must be one of schedule_first, "),
        (["--temperature", "-1"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--device", "nonsense"], "--device"),
    ],
)
def test_errors_are_one_line_that_names_the_cause(folder, capsys, arguments, named):
    assert run(folder, *arguments) == 2
    assert named in error_line(capsys)


def test_the_table(folder, models, capsys):
    denoiser, tokenizer, energies = models
    options = ["--energy", "none", "ar", "DATA/energy", "--steps", "1", "3", "--length", "10", "--num-samples", "2"]
    options += ["--candidates", "3", "--seed", "3", "--level", "character", "--order", "3", "--match", "variation_1"]
    output = folder / "report.json"
    assert evaluate(folder, *options, "--json", str(output)) == 0
    report = json.loads(output.read_text())
    assert capsys.readouterr().out.startswith("2 texts of 10 tokens")
    described = report["environment"]["models"]
    assert described["energy ar"]["fingerprint"] == fingerprint(energies["ar"].lm)
    assert described["model"]["class"] == "MaskedDenoiser"
    assert set(described) == {"model", "judge", "energy ar", f"energy {folder / 'energy'}"}
    names = {"none": None, "ar": energies["ar"], str(folder / "energy"): energies["trained"]}
    table = diffusion_table(
        denoiser, tokenizer, [(folder / "text.txt").read_text()], pyquiet.load("tiny-causal"), energies=names,
        steps=[1, 3], length=10, num_samples=2, candidates=3, seed=3, level="character", order=3, progress=False,
    )  # fmt: skip
    rows = table.to_dict()["rows"]
    assert [row["method"] for row in report["rows"]] == [row["method"] for row in rows]
    for found, row in zip(report["rows"], rows, strict=True):
        for name in set(row) - {"seconds", "method", "sampler", "energy", "steps", "trace"}:
            for part in ("mean", "standard_error"):
                assert found[name][part] == pytest.approx(row[name][part], rel=1e-4, abs=1e-9), (row["method"], name)
    matched = table.matched("variation_1").to_dict()
    assert report["matched"]["value"] == pytest.approx(matched["value"])
    assert set(report["matched"]["methods"]) == set(matched["methods"])
    assert (report["judge"], report["candidates"], report["texts"]) == ("tiny-causal", 3, 2)


def test_energies_of_the_table_compute_in_the_dtype_too(folder, capsys):
    few = ["--energy", "none", "ar", "--steps", "1", "--length", "10", "--num-samples", "2", "--dtype", "float64"]
    assert evaluate(folder, *few, "--json") == 0
    described = json.loads(capsys.readouterr().out)["environment"]["models"]
    assert {name: described[name]["dtype"] for name in ("model", "energy ar")} == dict.fromkeys(
        ("model", "energy ar"), "float64"
    )


def test_the_printed_table_and_the_figure(folder, capsys):
    pytest.importorskip("matplotlib")
    plot = folder / "table.png"
    options = ["--steps", "1", "2", "--length", "10", "--num-samples", "2", "--plot", str(plot)]  # and no energy
    assert evaluate(folder, *options, "--sampler", "schedule_first", "first_hitting") == 0
    first, *lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert first == "2 texts of 10 tokens; judge tiny-causal; means +- standard errors"
    assert [line.split()[0] for line in lines[1:5]] == ["text", "schedule_first", "schedule_first", "first_hitting"]
    assert "entropy (nats)" in lines[0]
    assert any(line.strip().startswith("at n-gram NLL") for line in lines)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_embedded_energies_are_compared_by_default(folder, capsys):
    sizes = ["--steps", "2", "--length", "10", "--num-samples", "3", "--candidates", "4", "--quiet", "--json"]
    assert main(["evaluate", "diffusion", "--text", str(folder / "text.txt"), *sizes]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["energy"] for row in report["rows"]] == ["none", "none", "ar", "tiny-energy"]
    for row in report["rows"][2:]:
        assert row["energy_passes"]["mean"] == 4 * row["denoiser_calls"]["mean"] > 0
    assert report["rows"][2]["perplexity"] != report["rows"][3]["perplexity"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--text", "/no/such/file"], "/no/such/file"),
        (["--length", "10000"], "--num-samples 16: the texts hold 0 pieces"),
        (["--judge", "/no/judge"], "--judge /no/judge"),
        (["--match", "entropy"], "--match"),
        (["--num-samples", "0"], "--num-samples"),
        (["--order", "0"], "--order"),
        (["--steps", "8", "0"], "--steps must be at least 1, got 0"),
        (["--plot", "table.jpg"], "table.jpg"),
        (["--json", "/no/folder/x"], "no folder /no/folder"),
        (["--energy", "/no/energy"], "--energy /no/energy"),
        (["--model", "/no/model"], "--model /no/model"),
    ],
)
def test_errors_of_evaluation(folder, capsys, arguments, named):
    assert evaluate(folder, *arguments) == 2
    assert named in error_line(capsys)
