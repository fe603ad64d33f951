"""`pyquiet train diffusion` and `energy` from words on the command line to trained models in folders."""

import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, ModernBertForMaskedLM

from pyquiet import load
from pyquiet.cli import main
from pyquiet.diffusion import NCEEnergy

from .one_line import error_line

SIZE = ["--layers", "2", "--width", "16", "--heads", "2", "--inner", "16"]
FEW = ["--steps", "2", "--max-length", "24", "--batch-size", "2", "--warmup-steps", "0", "--device", "cpu", "--quiet"]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time there was a king who had three daughters. " * 20, encoding="utf-8")
    return str(file)


def train(method, text, folder, *more):
    return main(["train", method, "--text", text, "--output", str(folder), *FEW, *more])


def fresh(text, folder, *more):
    return train("diffusion", text, folder, "--tokenizer", "tiny-causal", *SIZE, *more)


def test_a_denoiser_and_an_energy_are_trained_evaluated_and_saved(text, tmp_path, capsys):
    more = ["--log-every", "1", "--eval-text", text, "--eval-every", "2"]
    assert fresh(text, tmp_path / "denoiser", *more, "--attention", "eager", "--noise-schedule", "cosine") == 0
    out = capsys.readouterr().out
    assert out.count("  train  nelbo ") == 2
    assert out.count("  eval   nelbo ") == out.count("  perplexity ") == 1
    model = ModernBertForMaskedLM.from_pretrained(tmp_path / "denoiser")
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.intermediate_size) == (2, 16, 16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "denoiser")
    assert tokenizer.mask_token_id == model.config.mask_token_id == 2048
    assert len(tokenizer) == model.config.vocab_size == 2049
    causal = load("tiny-causal")[1]
    assert tokenizer("The king's <mask>").input_ids == [*causal("The king's ").input_ids, 2048]
    assert tokenizer("Caf\u00e9, 12 x").input_ids == causal("Caf\u00e9, 12 x").input_ids

    options = ["--denoiser", str(tmp_path / "denoiser"), "--negatives", "3"]
    assert train("energy", text, tmp_path / "energy", *options, *more) == 0
    out = capsys.readouterr().out
    assert out.count("  train  nce ") == 2
    assert out.count("  eval   nce ") == 1
    assert out.count("  right ") == out.count("  log Z ") == 3
    energy = AutoModel.from_pretrained(tmp_path / "energy")
    assert isinstance(energy, NCEEnergy)
    assert energy.mask_id == 2048
    assert energy.head[-1].weight.abs().max() > 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "energy")) == 2049
    assert train("energy", text, tmp_path / "more", *options, "--model", str(tmp_path / "energy")) == 0
    assert not torch.equal(AutoModel.from_pretrained(tmp_path / "more").head[-1].weight, energy.head[-1].weight)


def test_the_seed_makes_the_model(text, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert fresh(text, tmp_path / name, "--seed", seed) == 0
    a, b, c = (ModernBertForMaskedLM.from_pretrained(tmp_path / name).get_input_embeddings().weight for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_command_goes_on_where_it_was_stopped(text, tmp_path, capsys):
    options = ["--save-every", "2", "--steps", "4", "--ema", "0.5"]
    assert fresh(text, tmp_path / "whole", *options) == 0
    assert fresh(text, tmp_path / "halves", *options) == 0
    state = tmp_path / "halves" / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:10])  # as if it had been killed while writing
    capsys.readouterr()
    assert fresh(text, tmp_path / "halves", *options) == 0
    assert "going on from" in capsys.readouterr().out
    one, two = (ModernBertForMaskedLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_documents_stay_apart_on_request(tmp_path, monkeypatch):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in ("The king. " * 9, "The queen.")), encoding="utf-8")
    seen = []

    class StopError(Exception):
        pass

    def keep(self, model, args, train_dataset, **options):
        seen.append([row["input_ids"].tolist() for row in train_dataset])
        raise StopError

    monkeypatch.setattr("pyquiet.diffusion.trainer.DiffusionTrainer.__init__", keep)
    for more in ([], ["--documents-apart"]):
        words = ["train", "diffusion", "--dataset", str(file), "--output", str(tmp_path / "out"), *FEW, *SIZE, *more]
        with pytest.raises(StopError):
            main([*words, "--tokenizer", "tiny-causal"])
    packed, apart = seen
    assert [token for row in packed for token in row] == [token for row in apart for token in row]
    assert all(1 not in row[1:] for row in apart)
    assert any(1 in row[1:] for row in packed)
    assert max(map(len, apart)) == 24


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("diffusion", [], "say which --model to train"),
        ("diffusion", ["--model", "nowhere"], "nowhere: no model folder"),
        (
            "diffusion",
            ["--model", "tiny-causal"],
            "error: --model tiny-causal: model is a LlamaForCausalLM, which reads to",
        ),
        (
            "diffusion",
            ["--tokenizer", "tiny-causal", "--objective", "x"],
            "--objective must be one of low_variance",
        ),
        (
            "diffusion",
            ["--tokenizer", "tiny-causal", "--heads", "5"],
            "--width must be a multiple of --heads 5",
        ),
        ("energy", ["--denoiser", "nowhere"], "nowhere: no model folder"),
        ("energy", ["--denoiser", "tiny-causal", "--negatives", "0"], "--negatives must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(text, tmp_path, capsys, method, words, message):
    assert train(method, text, tmp_path / "out", *words) == 2
    assert message in error_line(capsys)
