"""`pyquiet diffuse` on texts longer than the model sees at once, and what has no table of such texts."""

import json

import pytest
import torch

import pyquiet
from pyquiet.cli import main
from pyquiet.gaps import Codec

WINDOWS = ["diffuse", "--energy", "none", "--sampler", "semi_autoregressive", "--steps", "2"]


def test_a_text_is_filled_in_windows(capsys):
    assert main([*WINDOWS, "--context", "6", "--length", "14", "--seed", "3", "--json"]) == 0
    (sample,) = json.loads(capsys.readouterr().out)["samples"]
    model, tokenizer = pyquiet.load("tiny-denoiser")
    codec = Codec(tokenizer)
    ids = torch.tensor([[tokenizer.bos_token_id] + 14 * [tokenizer.mask_token_id]])
    options = {"sampler": "semi_autoregressive", "context": 6, "steps": 2, "seed": 3, "temperature": 0.5}
    out = pyquiet.diffuse(model, input_ids=ids, banned=codec.banned(model.config.vocab_size), **options)
    assert sample["text"] == codec.decode(out.tokens[0].tolist())
    assert sample["denoiser_calls"] == int(out.denoiser_calls) > 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (WINDOWS, "--sampler semi_autoregressive needs --context"),
        (["diffuse", "--context", "8"], "--context has no use without --sampler semi_autoregressive"),
        ([*WINDOWS, "--context", "0"], "--context must be at least 1"),
        (["diffuse", "--energy", "none", "--length", "1025"], "columns are longer than the 1024"),
        (["evaluate", "diffusion", "--text", "FILE", "--sampler", "semi_autoregressive"], "--sampler must be one of"),
    ],
)
def test_errors_name_the_option(tmp_path, capsys, arguments, named):
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time. " * 50)
    assert main([str(file) if word == "FILE" else word for word in arguments]) == 2
    assert named in capsys.readouterr().err


def test_a_window_as_long_as_the_text_is_the_text(capsys):
    texts = []
    for arguments in ([*WINDOWS, "--context", "10"], ["diffuse", "--energy", "none", "--steps", "2"]):
        assert main([*arguments, "--length", "9", "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["samples"][0]["text"])
    assert texts[0] == texts[1]
