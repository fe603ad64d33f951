"""`pyquiet evaluate` with the embedded model: what it prints and writes, and its errors."""

import json

import pytest
import torch

import pyquiet
from pyquiet.cli import main
from pyquiet.evaluation import (
    DIGITS,
    direct_answers,
    majority_vote,
    opening_ids,
    read_gsm8k,
    thinking_gains,
    token_ids,
)

from .one_line import error_line

TEXT = "Once upon a time there was a king who had three sons. The youngest of them was called Simpleton.\n"
GSM8K = [{"question": f"How many legs have {i} dogs?", "answer": f"4 each.\n#### {4 * i}"} for i in (2, 3, 250)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A text, questions, and the embedded model with a head that uses its thoughts."""
    folder = tmp_path_factory.mktemp("evaluate")
    base, tokenizer = pyquiet.load("tiny-causal")
    torch.manual_seed(0)
    model = pyquiet.QuietStarForCausalLM.from_base(base, tokenizer=tokenizer, thought_tokens=2)
    torch.nn.init.normal_(model.mixing_head[-1].weight, std=0.1)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, GSM8K)))
    return folder


@pytest.fixture(scope="module")
def thinker(folder):
    model = pyquiet.QuietStarForCausalLM.from_pretrained(folder / "model").eval()
    return model, pyquiet.load("tiny-causal")[1]


def evaluate(folder, measure, *more):
    data = ["--text", str(folder / "text.txt")]
    if measure == "answers":
        data = ["--task", "gsm8k", "--data", str(folder / "gsm8k.jsonl")]
    return main(["evaluate", measure, "--model", str(folder / "model"), "--quiet", *data, *more])


def test_thoughts_are_reported_drawn_and_shown(folder, thinker, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model, tokenizer = thinker
    options = ["--seed", "3", "--thoughts-per-token", "2", "--max-tokens", "20"]
    files = ["--plot", str(tmp_path / "gain.png"), "--html", str(tmp_path / "page.html"), "--html-tokens", "7"]
    assert evaluate(folder, "thoughts", *options, *files) == 0
    gains = thinking_gains(
        model,
        [token_ids(tokenizer, TEXT)[:20]],
        seed=3,
        thoughts_per_token=2,
        opening=opening_ids(tokenizer),
        progress=False,
    )
    assert len(gains.token) == 20
    assert gains.gain.abs().max() > 1e-3
    assert capsys.readouterr().out == f"base entropy and NLL in nats\n{gains.table()}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gain.png", "page.html"]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<span") == 7
    assert f"gain {gains.gain[0]:+.3f} nats, entropy" in page
    assert (
        evaluate(folder, "thoughts", *options, "--by", "loss", "--json", "--batch-size", "1", "--max-length", "30") == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert (report["by"], report["seed"], report["text"]) == ("loss", 3, [str(folder / "text.txt")])
    expected = gains.table("loss").to_dict()
    assert report["bins"] == [pytest.approx(row, abs=1e-5, nan_ok=True) for row in expected["bins"]]
    assert report["total"] == pytest.approx(expected["total"], abs=1e-5)


def test_direct_answers(folder, thinker, capsys):
    items = read_gsm8k(folder / "gsm8k.jsonl")
    assert evaluate(folder, "answers", "--limit", "2", "--seed", "1") == 0
    assert capsys.readouterr().out == f"{direct_answers(*thinker, items[:2], DIGITS, seed=1, progress=False)}\n"
    assert evaluate(folder, "answers", "--think", "never", "--json", "--max-length", "20") == 0
    report = json.loads(capsys.readouterr().out)
    expected = direct_answers(*thinker, items, DIGITS, think=("never",), max_length=20, progress=False).to_dict()
    assert {name: report[name] for name in expected} == expected
    assert "always" not in report
    assert report["task"] == "gsm8k"


def test_majority_vote(folder, thinker, capsys, monkeypatch):
    temperatures = []

    def recorded(*arguments, **options):
        temperatures.append(options["temperature"])
        return majority_vote(*arguments, **options)

    monkeypatch.setattr("pyquiet.evaluation.majority_vote", recorded)
    options = ["--num-samples", "2", "--max-new-tokens", "3", "--temperature", "0.5", "--limit", "2", "--seed", "6"]
    assert evaluate(folder, "answers", "--majority-vote", *options, "--json", "--batch-size", "3") == 0
    report = json.loads(capsys.readouterr().out)
    items = read_gsm8k(folder / "gsm8k.jsonl")
    shape = {"limit": 2, "num_samples": 2, "max_new_tokens": 3, "temperature": 0.5}
    expected = majority_vote(*thinker, items, seed=6, **shape, progress=False)
    assert report["always"] == expected.to_dict()
    assert len(report["never"]["items"]) == 2
    assert evaluate(folder, "answers", "--majority-vote", *options, "--think", "always") == 0
    assert capsys.readouterr().out == f"always {expected}\n"
    assert temperatures == [0.5] * 3


@pytest.mark.parametrize(
    ("measure", "arguments", "named"),
    [
        ("thoughts", ["--text", "/no/such/file"], "/no/such/file"),
        ("thoughts", ["--text", "MODEL/model.safetensors"], "UTF-8"),
        ("thoughts", ["--plot", "gain.jpg"], "gain.jpg"),
        ("thoughts", ["--html", "/no/folder/page.html"], "no folder /no/folder"),
        ("thoughts", ["--max-tokens", "0"], "--max-tokens"),
        ("thoughts", ["--html-tokens", "0"], "--html-tokens"),
        ("thoughts", ["--max-length", "2"], "--max-length 2"),
        ("thoughts", ["--device", "nonsense"], "--device"),
        ("thoughts", ["--model", "/no/such/model"], "/no/such/model"),
        ("answers", ["--data", "TEXT"], "line 1: not a GSM8K item"),
        ("answers", ["--limit", "0"], "--limit"),
        ("answers", ["--majority-vote", "--task", "commonsenseqa"], "--task gsm8k"),
        ("answers", ["--majority-vote", "--num-samples", "0"], "--num-samples must be at least 1, got 0"),
        ("answers", ["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    ],
)
def test_errors_are_one_line_that_names_the_cause(folder, capsys, measure, arguments, named):
    arguments = [a.replace("MODEL", str(folder / "model")).replace("TEXT", str(folder / "text.txt")) for a in arguments]
    assert evaluate(folder, measure, *arguments) == 2
    assert named in error_line(capsys)
