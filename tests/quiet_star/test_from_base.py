"""`from_base`: where START and END begin, what is wrapped, and the official form."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import pyquiet

from . import sequential_reference as reference
from .architectures import EOS, PAD, VOCABULARY, build
from .thinkers import assert_close, assert_same_thoughts, random_ids, thinker

from_base = pyquiet.QuietStarForCausalLM.from_base
DASHES = 41


def tokenizer():
    """Words to ids; "---" is one token, and an opening token stands before every ordinary text."""
    words = {"<unk>": 0, "<s>": 1, "---": DASHES, "once": 5, "upon": 6}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")


def starts(model):
    """START and END as the network sees them."""
    scale = model.config.embedding_scale
    assert scale == reference.EMBEDDING_SCALE
    return scale * model.start_embedding, scale * model.end_embedding


@pytest.mark.parametrize("name", ["llama", "gemma3", "granite"])
def test_start_init_is_the_embedding_of_that_token(name):
    base = build(name)
    expected = base.get_input_embeddings()(torch.tensor(17))
    for embedding in starts(from_base(base, start_init=17)):
        assert_close(embedding, expected, 1e-12)


def test_a_tokenizer_gives_the_first_token_of_three_dashes():
    assert tokenizer()("---").input_ids == [1, DASHES]
    base = build("llama")
    expected = base.get_input_embeddings().weight[DASHES]
    for embedding in starts(from_base(base, tokenizer=tokenizer())):
        assert_close(embedding, expected, 1e-12)


def test_with_neither_the_mean_embedding():
    base = build("llama")
    expected = base.get_input_embeddings().weight.mean(0)
    for embedding in starts(from_base(base)):
        assert_close(embedding, expected, 1e-7)


@torch.no_grad()
def test_start_and_end_are_two_parameters():
    model = from_base(build("llama"))
    model.start_embedding.add_(1)
    assert not torch.equal(model.start_embedding, model.end_embedding)
    names = dict(model.named_parameters())
    assert names["start_embedding"].shape == names["end_embedding"].shape == (64,)


def test_the_default_is_five_thought_tokens():
    model = from_base(build("llama"))
    assert model.config.thought_tokens == 5
    assert model.think_at_every_token(random_ids(1, 3), seed=0).tokens.shape == (1, 3, 1, 5)


@torch.no_grad()
def test_a_path(tmp_path):
    base = build("llama", dtype=torch.float32, attention="sdpa")
    base.generation_config.eos_token_id = EOS
    base.generation_config.pad_token_id = PAD
    base.save_pretrained(tmp_path)
    ids = random_ids(2, 5)
    for path in (tmp_path, str(tmp_path)):
        model = from_base(path, thought_tokens=2, start_init=7).eval()
        assert torch.equal(model.base(ids).logits, base(ids).logits)
        in_memory = from_base(base, thought_tokens=2, start_init=7).eval()
        expected = in_memory.think_at_every_token(ids, seed=1)
        assert_same_thoughts(model.think_at_every_token(ids, seed=1), expected, 0)
        assert model.generation_config.eos_token_id == EOS


def test_a_path_that_does_not_exist_is_named(tmp_path):
    with pytest.raises((OSError, ValueError), match="nowhere"):
        from_base(tmp_path / "nowhere")


@pytest.mark.parametrize("official", [False, True])
@torch.no_grad()
def test_the_given_base_keeps_its_parameters(official):
    base, ids = build("llama", attention="sdpa"), random_ids(2, 5)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    logits, settings = base(ids).logits, base.config.to_dict()
    model = from_base(base, start_init=7, official=official)
    model.think_at_every_token(ids, seed=1)
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert base.config.to_dict() == settings
    assert torch.equal(base(ids).logits, logits)


def test_the_base_itself_is_wrapped_not_a_copy():
    base = build("llama")
    assert from_base(base).base is base


@torch.no_grad()
def test_a_new_head_is_like_the_base_in_dtype_and_moves_with_it():
    model = from_base(build("llama", dtype=torch.float32))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in model.double().parameters()} == {torch.float64}


@torch.no_grad()
def test_official_adds_two_rows():
    model, ids = thinker(m=3, official=True), random_ids(2, 5)
    logits = model(ids, think="always", seed=2).logits
    assert logits.shape == (2, 5, VOCABULARY + 2)
    assert torch.isfinite(logits).all()
    plain = thinker(m=3)(ids, think="always", seed=2).logits
    assert plain.shape == (2, 5, VOCABULARY)


@torch.no_grad()
def test_official_thoughts_equal_the_explicit_sequences():
    """The two rows take part in every softmax, but START and END are banned from the thoughts."""
    model, ids = thinker(m=3, official=True), random_ids(2, 5)
    banned = torch.arange(VOCABULARY + 2) >= VOCABULARY
    law = reference.Law(banned=banned)
    expected = reference.think_everywhere(model, ids, m=3, thoughts=2, seed=2, law=law)
    actual = model.think_at_every_token(ids, seed=2, thoughts_per_token=2)
    assert_same_thoughts(actual, expected, 1e-12)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"thought_tokens": -1}, "thought_tokens"),
        ({"thought_tokens": 2.5}, "thought_tokens"),
        ({"start_init": VOCABULARY}, "start_init"),
        ({"start_init": -1}, "start_init"),
        ({"start_init": 1.5}, "start_init"),
        ({"start_init": True}, "start_init"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, name):
    base = build("llama")
    with pytest.raises((ValueError, TypeError), match=name):
        from_base(base, **options)
    assert base.config._attn_implementation == "exact_softmax"


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan"), "a", None], ids=str)
def test_an_embedding_scale_that_is_none_is_named(scale):
    with pytest.raises((ValueError, TypeError), match="embedding_scale must be"):
        pyquiet.QuietStarConfig(embedding_scale=scale)


def test_a_tokenizer_that_has_no_dashes_leaves_the_mean():
    base = build("llama")
    expected = from_base(base).start_embedding
    assert torch.equal(from_base(base, tokenizer=lambda *_, **__: {"input_ids": []}).start_embedding, expected)


@pytest.mark.parametrize("thing", [None, 7, torch.nn.Linear(2, 2)], ids=str)
def test_what_is_no_model_is_refused(thing):
    with pytest.raises((ValueError, TypeError), match=r"model|base"):
        from_base(thing)
