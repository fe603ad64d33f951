"""The embedded models load offline, each of its kind, and tiny-causal knows English prose."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    XLNetLMHeadModel,
)

import pyquiet
from pyquiet import zoo

REPOSITORY = Path(__file__).parents[2]
FOLDER = Path(zoo.__file__).parent / "tiny-causal"
RECIPE = REPOSITORY / "recipes" / "tiny_causal"
BOOK = "grimm"
PROMPTS = [
    "Once upon a time there was a king who",
    "It was a cold and dark evening, and",
    '"I do not know what you mean," said',
    "She looked at him for a moment, and then",
    "The ship was now",
]

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return pyquiet.load("tiny-causal")


def mean_log_prob(model: PreTrainedModel, ids: Tensor) -> float:
    """Per token, in nats; ids [1, T]."""
    with torch.inference_mode():
        return -model(ids, labels=ids).loss.item()


def test_all_load_offline_without_a_cache(tmp_path: Path) -> None:
    code = """
import socket
import pyquiet
socket.socket.connect = socket.getaddrinfo = None  # any use of the network is a TypeError
for name in pyquiet.zoo.available():
    model, tokenizer = pyquiet.load(name)
    print(name)
ids = tokenizer("The king", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] - ids.shape[1])"""
    cache = tmp_path / "cache"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cache)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [*zoo.available(), "3"]
    assert not [file for file in cache.rglob("*") if file.suffix in (".safetensors", ".json")]


def test_the_tokenizer_knows_the_context(loaded: Loaded) -> None:
    model, tokenizer = loaded
    assert tokenizer.model_max_length == model.config.max_position_embeddings


def test_loading_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    zoo.load("tiny-causal")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["tiny-casual", "", "../zoo/tiny-causal", "tiny-causal/"])
def test_unknown_name_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name)) + ".*tiny-causal"):
        pyquiet.load(name)


KINDS = {
    "tiny-any-subset": XLNetLMHeadModel,
    "tiny-causal": LlamaForCausalLM,
    "tiny-denoiser": ModernBertForMaskedLM,
    "tiny-draft": LlamaForCausalLM,
    "tiny-energy": pyquiet.NCEEnergy,
    "tiny-puzzler": pyquiet.QuietStarForCausalLM,
    "tiny-target": LlamaForCausalLM,
    "tiny-thinker": pyquiet.QuietStarForCausalLM,
}


def test_there_are_these_models() -> None:
    assert zoo.available() == [*KINDS]


@pytest.mark.parametrize("name", KINDS)
def test_a_model_comes_in_float32_and_evaluation_mode_with_its_tokenizer(name: str) -> None:
    model, tokenizer = zoo.load(name)
    assert type(model) is KINDS[name]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("text", ["A plain line.", "Two\n\nparagraphs", "caf\u00e9 \u2014 \u4eba", " x"])
def test_tokenizer_round_trip(loaded: Loaded, text: str) -> None:
    _, tokenizer = loaded
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    # The Auto class must not rebuild the tokenizer by the model's family.
    assert ids == Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode(text).ids


def test_dashes_start_with_a_dash_token(loaded: Loaded) -> None:
    _, tokenizer = loaded
    first = tokenizer("---", add_special_tokens=False).input_ids[0]
    assert set(tokenizer.decode([first])) == {"-"}


def test_word_order_matters_to_the_model(loaded: Loaded) -> None:
    model, tokenizer = loaded
    sentences = [
        "The old man went slowly down the road to the village.",
        "She had never seen such a beautiful garden in her life.",
        "He took the letter from the table and began to read it.",
        "I should be very glad to see you again, my dear friend.",
    ]
    for sentence in sentences:
        reversed_words = " ".join(sentence.rstrip(".").split()[::-1]) + "."
        right, wrong = (
            mean_log_prob(model, tokenizer(text, return_tensors="pt").input_ids) for text in (sentence, reversed_words)
        )
        assert right > wrong + 0.5, sentence


def test_context_helps_up_to_its_full_length(loaded: Loaded, books: list) -> None:
    model, tokenizer = loaded
    text = "\n\n".join(paragraph for section in book(books).held_out for paragraph in section)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :1024]
    assert ids.shape[1] == 1024
    with torch.inference_mode():
        full = model(ids).logits[0, 767:-1].log_softmax(-1)
        short = model(ids[:, 752:]).logits[0, 15:-1].log_softmax(-1)
    targets = ids[0, 768:, None]
    assert full.gather(1, targets).mean() > short.gather(1, targets).mean()


@pytest.fixture
def books(shared: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    if not RECIPE.is_dir():
        pytest.skip(f"no recipe folder {RECIPE}")
    folder = shared / "data" / "text" / "gutenberg"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} with the training books")
    monkeypatch.syspath_prepend(RECIPE)
    import corpus

    return corpus.read_books(folder)


def book(books: list):
    return next(item for item in books if item.name == BOOK)


def stated_perplexity(name: str) -> float:
    row = re.search(rf"^\| {name} \| \d+ \| [\d.]+ \| ([\d.]+) \|", card(), re.MULTILINE)
    assert row, f"the model card has no row for {name}"
    return float(row[1])


def card() -> str:
    return (FOLDER / "README.md").read_text(encoding="utf-8")


def test_stated_perplexity_is_reproduced(loaded: Loaded, books: list) -> None:
    from evaluate import held_out_scores

    model, _ = loaded
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    score = held_out_scores(model, tokenizer, [book(books)])[BOOK]
    assert math.isclose(score.perplexity, stated_perplexity(BOOK), rel_tol=0.02)


def test_greedy_text_is_made_of_words_of_the_books(loaded: Loaded, books: list) -> None:
    model, tokenizer = loaded
    sections = [section for item in books for section in item.train + item.held_out]
    known = set(re.findall(r"[a-z]+", " ".join(p for s in sections for p in s).lower()))
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        start = inputs.input_ids.shape[1]
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, start:]
        # The last word may be cut off by the limit.
        text = tokenizer.decode(ids, skip_special_tokens=True).rpartition(" ")[0]
        words = re.findall(r"[a-z]+", text.lower())
        assert len(words) >= 15, text
        unknown = [word for word in words if word not in known]
        assert not unknown, (prompt, unknown)
