"""`pyquiet train quiet-star` from words on the command line to a trained model in a folder."""

import json

import pytest
import torch

from pyquiet import QuietStarForCausalLM, load
from pyquiet.cli import main
from pyquiet.cli.train_quiet_star import OPTIONS, training_arguments

from .one_line import error_line


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time there was a king who had three daughters. " * 20, encoding="utf-8")
    return str(file)


def train(text, folder, *more):
    options = ["--steps", "2", "--max-length", "24", "--batch-size", "2", "--thought-tokens", "1", "--quiet"]
    options += ["--device", "cpu"]
    return main(["train", "quiet-star", "--text", text, "--output", str(folder), *options, *more])


def test_a_model_is_trained_and_saved(text, tmp_path, capsys):
    rates = ["--learning-rate", "1e-3", "--warmup-steps", "0", "--log-every", "1"]
    assert train(text, tmp_path / "out", *rates, "--eval-text", text, "--eval-every", "2") == 0
    out = capsys.readouterr().out
    assert out.count("  train  base ") == 2
    assert out.count("  eval   base ") == 1
    model = QuietStarForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.thought_tokens == 1
    assert model.mixing_head[-1].weight.any()
    assert main(["think", "--model", str(tmp_path / "out"), "--prompt", "The king", "--max-new-tokens", "2"]) == 0


def test_the_command_goes_on_where_it_was_stopped(text, tmp_path, capsys):
    """Four steps at once, or two, an interruption before the schedule's end, and the command once more."""
    rates = ["--learning-rate", "1e-3", "--save-every", "2", "--warmup-steps", "0", "--steps", "4"]
    assert train(text, tmp_path / "whole", *rates) == 0
    assert train(text, tmp_path / "halves", *rates) == 0
    for name in ("checkpoint-4", "model.safetensors"):
        path = tmp_path / "halves" / name
        if path.is_dir():
            (path / "trainer_state.json").write_text("{")  # as if the power had gone while it was written
        else:
            path.unlink()
    capsys.readouterr()
    assert train(text, tmp_path / "halves", *rates) == 0
    out = capsys.readouterr().out
    assert "going on from" in out
    assert out.endswith(f"the trained model is in {tmp_path / 'halves'}\n")
    whole, halves = (QuietStarForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    state = json.loads((tmp_path / "halves" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    files = sorted(tmp_path.rglob("*"))
    assert train(text, tmp_path / "halves", *rates) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == files


def test_weights_in_half_precision_are_trained_in_single(text, tmp_path):
    base, tokenizer = load("tiny-causal")
    base.half().save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    assert train(text, tmp_path / "out", "--model", str(tmp_path / "half"), "--steps", "1") == 0
    model = QuietStarForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--lookahead", "0"], "--lookahead must be at least 1, got 0"),
        (["--lookahead", "many"], "--lookahead must be a whole number, got 'many'"),
        (["--max-length", "5000"], "context"),
        (["--set", "no_such_argument=1"], "--set no_such_argument: QuietStarTrainingArguments has no such argument"),
        (["--curriculum", "3,2:10"], "--steps must be left out"),
        (["--schedule", "wavy"], "--schedule must be one of linear, "),
        (["--device", "meta"], "--device must be one of cpu, cuda, got 'meta'"),
        (["--curriculum", "5"], "curriculum"),
        (["--model", "no/such/folder"], "no model folder"),
        (["--eval-text", "no-such-file.txt"], "no-such-file.txt"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_errors_are_one_line(text, tmp_path, capsys, words, match):
    assert train(text, tmp_path / "out", *words) == 2
    assert match in error_line(capsys)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_options_reach_the_arguments(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("pyquiet.cli.train_quiet_star.run", lambda args: seen.append(training_arguments(args)) or 0)
    words = ["--official", "--thoughts-per-token", "3", "--policy-weight", "0.5", "--accumulate", "4", "--bf16"]
    words += ["--curriculum", "3,2:10", "1,1:5", "--device", "cpu"]
    words += ["--set", "adam_beta2=0.95", "gradient_checkpointing"]
    assert main(["train", "quiet-star", "--text", "x", "--output", str(tmp_path), *words]) == 0
    (arguments,) = seen
    assert arguments.objective.official
    assert arguments.objective.policy_weight == 0.5
    assert arguments.objective.baseline == "mean"
    assert (arguments.thoughts_per_token, arguments.gradient_accumulation_steps, arguments.max_steps) == (3, 4, 15)
    assert arguments.bf16
    assert arguments.gradient_checkpointing
    assert arguments.adam_beta2 == 0.95
    assert {name for name, *_ in OPTIONS.values()} <= set(vars(arguments))
