"""One thread for the tiny models, and one that reads characters."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..quiet_star.architectures import build
from ..quiet_star.thinkers import awake
from ..single_thread import one_thread as one_thread

CHARACTERS = ["<unk>", "<eos>", *string.printable[:95], "\n"]  # digits, letters, punctuation, space


@pytest.fixture(scope="session")
def by_character() -> Any:
    """A tokenizer of single characters, without BOS."""
    words = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


@pytest.fixture(scope="session")
def reader() -> Any:
    """A thinking model of these characters in float64, random, with w > 0, and room for long prompts."""
    from pyquiet import QuietStarForCausalLM

    base = build("llama", dtype=torch.float64, vocab_size=len(CHARACTERS), max_position_embeddings=640)
    model = awake(QuietStarForCausalLM.from_base(base, thought_tokens=2, start_init=7))
    model.base.generation_config.eos_token_id = model.generation_config.eos_token_id = 1
    return model
