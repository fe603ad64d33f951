"""Specification 16, T10: scores of chunks, from texts to numbers, are sums of log-softmax over the right tokens."""

from __future__ import annotations

import asyncio

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pyquiet.scaling.backends.base import Generated, Usage
from pyquiet.scaling.backends.codec import HFCodec
from pyquiet.scaling.backends.huggingface import HFBackend
from pyquiet.scaling.records import Question
from pyquiet.scaling.score import ChunkView, MeanNLL
from pyquiet.scaling.views import Views

from .byte_tokens import byte_tokenizer

QUESTION = Question("q", "2+2?")
BYTES, BOS = byte_tokenizer(), byte_tokenizer(bos=True)
MERGED = byte_tokenizer([("a", "b"), ("ab", "c"), ("?", "a"), ("c", "d")])


def llama(words: int) -> LlamaForCausalLM:
    torch.manual_seed(words)
    config = LlamaConfig(
        vocab_size=words, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def brute_force(model: LlamaForCausalLM, ids: list[int], places: list[int]) -> float:
    """Mean NLL of the tokens at these places."""
    with torch.no_grad():
        laws = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(float(laws[place - 1, ids[place]]) for place in places) / len(places)


def graded(draft: HFBackend, target: HFBackend, written: str, chunk: str) -> tuple[float | None, Usage]:
    views = Views(draft, target, QUESTION, template="{question}")
    if written:
        views.append(Generated(draft.codec.encode(written).ids, written, "stop", Usage()), "draft")
    text = Generated(draft.codec.encode(chunk).ids, chunk, "stop", Usage())
    prompt, start = views.with_chunk(text)

    async def score() -> tuple[float | None, Usage]:
        await target.open()
        found = await MeanNLL(min_tokens=1)(ChunkView("c", QUESTION, prompt, start, chunk), target)
        await target.close()
        return found.score, found.usage

    return asyncio.run(score())


@pytest.mark.parametrize(
    ("draft", "target", "written", "chunk"),
    [
        (BYTES, BYTES, "", "abcd"),  # the chunk's first token is the first behind the head
        (BYTES, BYTES, "abc", "dab"),
        (BOS, BOS, "abc", "dab"),
        (BYTES, MERGED, "ab", "cdab"),  # "ab" + "c" is one token of the target, and so is "cd"
        (BYTES, MERGED, "", "abc"),  # "?" and "a" are one token, which counts since it overlaps the chunk
        (MERGED, BOS, "abc", "dabc"),
        (BYTES, BYTES, "ab", "\u20acd"),  # three bytes a character
        (BYTES, MERGED, "ab", "\u20accd"),
    ],
)
def test_a_score_is_that_of_all_tokens_that_overlap_the_chunk(
    draft: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast, written: str, chunk: str
) -> None:
    model = llama(len(target))
    backends = HFBackend(llama(len(draft)), draft), HFBackend(model, target)
    before = QUESTION.text + written
    shared = HFCodec(draft).fingerprint == HFCodec(target).fingerprint
    encoded = HFCodec(target).encode(before + chunk)
    opening = [0] if target is BOS else []
    ids = opening + list(encoded.ids)
    places = [len(opening) + i for i, (_, end) in enumerate(encoded.offsets) if end > len(before)]
    score, usage = graded(*backends, written, chunk)
    assert shared == (draft is target)
    assert score == pytest.approx(brute_force(model, ids, places), abs=1e-5)
    assert usage.prompt_tokens == len(ids)
    assert ids.count(0) == len(opening)
