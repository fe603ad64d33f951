"""`pyquiet train any-subset` from words on the command line to a trained model in a folder."""

import json

import pytest
import torch
from transformers import AutoTokenizer, XLNetLMHeadModel

from pyquiet import AnySubsetTrainingArguments, load
from pyquiet.cli import main
from pyquiet.cli.train_any_subset import OPTIONS
from pyquiet.cli.training import training_arguments

from .one_line import error_line

SIZE = ["--layers", "2", "--width", "16", "--heads", "2", "--inner", "32"]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time there was a king who had three daughters. " * 20, encoding="utf-8")
    return str(file)


def train(text, folder, *more):
    options = ["--steps", "2", "--max-length", "24", "--batch-size", "2", "--tokenizer", "tiny-causal", *SIZE]
    options += ["--device", "cpu", "--quiet"]
    return main(["train", "any-subset", "--text", text, "--output", str(folder), *options, *more])


def test_a_fresh_model_is_trained_evaluated_and_saved(text, tmp_path, capsys):
    rates = ["--learning-rate", "1e-2", "--warmup-steps", "0", "--log-every", "1"]
    assert train(text, tmp_path / "out", *rates, "--eval-text", text, "--eval-every", "2") == 0
    out = capsys.readouterr().out
    assert out.count("  train  joint ") == 2
    assert out.count("%  ") == 2
    assert out.count("  eval   50 % masked: joint ") == 1
    assert "; 95 % masked: joint " in out
    model = XLNetLMHeadModel.from_pretrained(tmp_path / "out")
    assert (model.config.n_layer, model.config.d_model, model.config.n_head, model.config.d_inner) == (2, 16, 2, 32)
    assert model.config.clamp_len == 64
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 2048
    assert train(text, tmp_path / "more", "--model", str(tmp_path / "out"), "--draft-weight", "0", *rates) == 0
    assert "draft" not in capsys.readouterr().out
    trained = XLNetLMHeadModel.from_pretrained(tmp_path / "more")
    assert not torch.equal(trained.lm_loss.bias, model.lm_loss.bias)
    assert torch.allclose(trained.lm_loss.bias, model.lm_loss.bias, atol=0.1)  # two small steps from there


def test_the_seed_makes_the_model(text, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train(text, tmp_path / name, "--seed", seed) == 0
    a, b, c = (XLNetLMHeadModel.from_pretrained(tmp_path / name).lm_loss.weight for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_command_goes_on_where_it_was_stopped(text, tmp_path, capsys):
    rates = ["--learning-rate", "1e-3", "--save-every", "2", "--warmup-steps", "0", "--steps", "4"]
    assert train(text, tmp_path / "whole", *rates) == 0
    assert train(text, tmp_path / "halves", *rates) == 0
    (tmp_path / "halves" / "checkpoint-4" / "trainer_state.json").write_text("{")  # as if the power had gone
    (tmp_path / "halves" / "model.safetensors").unlink()
    capsys.readouterr()
    assert train(text, tmp_path / "halves", *rates) == 0
    assert "going on from" in capsys.readouterr().out
    whole, halves = (XLNetLMHeadModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_the_embedded_model_and_data_of_the_datasets_library(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"body": f"The king said {i}."}) + "\n" for i in range(20)))
    options = ["--dataset", str(file), "--eval-dataset", str(file), "--dataset-column", "body", "--steps", "1"]
    options += ["--model", "tiny-any-subset", "--max-length", "16", "--batch-size", "2", "--eval-every", "1"]
    assert main(["train", "any-subset", *options, "--output", str(tmp_path / "out"), "--device", "cpu", "--quiet"]) == 0
    state = json.loads((tmp_path / "out" / "checkpoint-1" / "trainer_state.json").read_text())
    assert any("eval_joint_nll_50" in log for log in state["log_history"])
    model = XLNetLMHeadModel.from_pretrained(tmp_path / "out")
    assert model.config.d_model == load("tiny-any-subset")[0].config.d_model


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--draft-weight", "2"], "--draft-weight must be in [0, 1], got 2"),
        (["--low-mask-rate", "many"], "--low-mask-rate must be a number, got 'many'"),
        (["--low-mask-rate", "0.99"], "high_mask_rate"),
        (["--set", "no_such_argument=1"], "no_such_argument"),
        (["--model", "no/such/folder"], "no model folder"),
        (["--tokenizer", "no/such/folder"], "--tokenizer no/such/folder: no tokenizer there"),
        (["--model", "tiny-causal"], "XLNetLMHeadModel"),
        (["--eval-text", "no-such-file.txt"], "no-such-file.txt"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_errors_are_one_line(text, tmp_path, capsys, words, match):
    assert train(text, tmp_path / "out", *words) == 2
    assert match in error_line(capsys)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*"))


def test_a_fresh_model_needs_a_tokenizer(text, tmp_path, capsys):
    assert main(["train", "any-subset", "--text", text, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "--tokenizer" in capsys.readouterr().err


def test_options_reach_the_arguments(tmp_path, monkeypatch):
    seen = []

    def run(args):
        seen.append(training_arguments(args, AnySubsetTrainingArguments, OPTIONS))
        return 0

    monkeypatch.setattr("pyquiet.cli.train_any_subset.run", run)
    words = [
        "--draft-weight",
        "0.25",
        "--high-mask-rate",
        "0.8",
        "--start-mask-rate",
        "0.2",
        "--mask-warmup-steps",
        "9",
    ]
    words += ["--accumulate", "4", "--bf16", "--device", "cpu", "--set", "adam_beta2=0.95", "largest_block=9"]
    assert main(["train", "any-subset", "--text", "x", "--output", str(tmp_path), *words]) == 0
    (arguments,) = seen
    assert (arguments.draft_weight, arguments.high_mask_rate, arguments.start_mask_rate) == (0.25, 0.8, 0.2)
    assert (arguments.mask_warmup_steps, arguments.gradient_accumulation_steps, arguments.largest_block) == (9, 4, 9)
    assert arguments.adam_beta2 == 0.95
    assert arguments.bf16
    assert {name for name, *_ in OPTIONS.values()} <= set(vars(arguments))
