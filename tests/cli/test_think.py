"""`pyquiet think` on a tiny random model saved to disk: what it prints, and its errors."""

import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pyquiet import QuietStarForCausalLM
from pyquiet.cli import main

from .one_line import error_line

WORDS = ["---", *(f"w{i}" for i in range(40))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A plain causal LM and a thinking one whose head uses its thoughts."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="---"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    thinker = QuietStarForCausalLM.from_base(base, thought_tokens=3)
    torch.nn.init.normal_(thinker.mixing_head[-1].weight)
    plain, thinking = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("thinking")
    for folder, model in ((plain, base), (thinking, thinker)):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(plain), str(thinking)


def think(folder, *more):
    return main(["think", "--model", folder, "--prompt", "w1 w2", "--max-new-tokens", "7", *more])


def test_the_answer_continues_the_prompt_and_repeats_with_the_seed(folders, capsys):
    answers = []
    for seed in ("3", "3", "4"):
        assert think(folders[1], "--seed", seed) == 0
        answers.append(capsys.readouterr().out)
    words = answers[0].split()
    assert words[:2] == ["w1", "w2"]
    assert len(words) == 9
    assert set(words) <= set(WORDS)
    assert answers[0] == answers[1] != answers[2]


def test_thoughts_are_shown_a_line_a_token(folders, capsys):
    assert think(folders[1], "--show-thoughts", "--thoughts-per-token", "2") == 0
    prompt, *lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert prompt == "w1 w2"
    assert len(lines) == 7 * 2
    for line in lines:
        thought = line.split("thought ")[1].strip("'").split()
        assert len(thought) == 3
        assert set(thought) <= set(WORDS)
        assert float(line.split("w ")[1].split()[0]) != 0


def test_a_plain_model_answers_as_it_would_alone_and_says_so(folders, capsys):
    assert think(folders[0], "--temperature", "0") == 0
    thinking = capsys.readouterr()
    assert "weight is 0" in thinking.err
    assert think(folders[0], "--temperature", "0", "--think", "never") == 0
    assert capsys.readouterr().out == thinking.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--model", "tiny-denoiser"], "not a causal decoder"),
        (["--max-new-tokens", "500"], "max_position_embeddings"),
        (["--temperature", "1e-50"], "--temperature must be 0 (greedy) or in"),
        (["--top-p", "0"], "--top-p"),
        (["--top-k", "0"], "--top-k"),
        (["--device", "nonsense"], "--device"),
        (["--prompt", "\udce4"], "UTF-8"),
        (["--thought-temperature", "-1"], "--thought-temperature must be 0 (greedy) or in [1e-37, 1e37], got -1"),
        (["--thought-tokens", "4"], "--thought-tokens"),
        (["--prompt", ""], "empty prompt"),
        (["--show-thoughts", "--think", "never"], "--show-thoughts"),
    ],
)
def test_errors_are_one_line_that_names_the_cause(folders, capsys, arguments, named):
    assert think(folders[1], *arguments) == 2
    assert named in error_line(capsys)


def test_an_empty_prompt_among_many_is_told_with_its_line(folders, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "w1"}\n{"prompt": ""}\n')
    given = ["--prompts", str(tmp_path / "p.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["think", "--model", folders[1], "--max-new-tokens", "7", *given]) == 2
    assert "p.jsonl, line 2: input_ids must be [B, T] with at least one token" in error_line(capsys)


def test_broken_weights_are_named(folders, tmp_path, capsys):
    shutil.copytree(folders[1], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not weights")
    assert think(str(tmp_path / "model")) == 2
    assert "weights cannot be read" in capsys.readouterr().err
