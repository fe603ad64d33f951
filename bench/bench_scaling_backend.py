"""Models in this process: many requests at once against `generate` on a batch, scores against plain forwards."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers import LlamaForCausalLM

import pyquiet
from pyquiet.scaling.backends.base import Generate, Generated, Prompt, Score, Scored
from pyquiet.scaling.backends.huggingface import HFBackend
from pyquiet.tokens import padded

from .models import SHAPES
from .timing import best_seconds

TOKENS, CHUNK, HISTORY = 48, 48, 300
Ids = list[tuple[int, ...]]


def endless(name: str) -> HFBackend:
    """A backend whose texts end with no token, so that every method writes as many of them."""
    model, tokenizer = pyquiet.load("tiny-target")
    if name != "tiny-target":
        torch.manual_seed(0)
        model = LlamaForCausalLM(SHAPES[name]).eval()
    model.generation_config.eos_token_id = None
    backend = HFBackend(model, tokenizer)
    backend._eos = frozenset()
    return backend


def prompts(batch: int, tokens: int, spread: int = 0) -> Ids:
    rng = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(3, 500, (tokens + i % (spread + 1),), generator=rng).tolist()) for i in range(batch)]


def through(backend: HFBackend, requests: Sequence[Any]) -> Callable[[], list[Any]]:
    """Sends all requests at once and returns the answers; what is kept of texts that were written is forgotten."""
    loop = asyncio.new_event_loop()

    async def ask() -> list[Any]:
        for request in requests:
            if isinstance(request, Generate):
                backend.forget(request.chain)
        calls = [backend.score(r) if isinstance(r, Score) else backend.generate(r) for r in requests]
        return list(await asyncio.gather(*calls))

    loop.run_until_complete(backend.open())
    return lambda: loop.run_until_complete(ask())


@pytest.mark.parametrize("method", ["pyquiet", "generate"])
@pytest.mark.parametrize("shape", ["equal", "mixed"])
@pytest.mark.parametrize(
    ("name", "batch"), [("tiny-target", 1), ("tiny-target", 16), ("tiny-target", 64), ("llama-15m", 16)]
)
def test_writing(benchmark: BenchmarkFixture, name: str, batch: int, shape: str, method: str) -> None:
    """Prompts of 60 to 75 tokens, sampled; all ask for 48 tokens, or (mixed) for 12, 24, 36 and 48 in turns.

    `generate` reads all prompts in one batch and writes until the longest text is done.
    """
    if shape == "mixed" and batch == 1:
        pytest.skip("one request alone")
    backend, ids = endless(name), prompts(batch, 60, 15)
    lengths = [TOKENS if shape == "equal" else TOKENS * (1 + i % 4) // 4 for i in range(batch)]
    if method == "pyquiet":
        requests = [
            Generate(f"c{i}", Prompt(row), n, 0.8, 1.0, i) for i, (row, n) in enumerate(zip(ids, lengths, strict=True))
        ]
        run = through(backend, requests)
        check: list[Generated] = run()
        assert [len(text.ids or ()) for text in check] == lengths
    else:
        rows, mask = padded(ids, "left")

        def run() -> Any:
            return backend.model.generate(
                rows, attention_mask=mask, max_new_tokens=TOKENS, do_sample=True, temperature=0.8, top_k=0,
                pad_token_id=0,
            )  # fmt: skip

        assert run().shape[1] == rows.shape[1] + TOKENS
    seconds = best_seconds(benchmark, run, budget=3.0)
    if method == "pyquiet":
        backend._worker.close()
    benchmark.extra_info.update(
        table=f"writing up to {TOKENS} tokens behind prompts of 60 to 75, sampled; tokens that were asked for a second",
        shape=f"{name}, {batch} {shape}",
        method=method,
        seconds=seconds,
        tokens_a_second=sum(lengths) / seconds,
    )


@pytest.mark.parametrize("method", ["pyquiet", "pyquiet uncached", "plain forward"])
@pytest.mark.parametrize(("name", "batch"), [("tiny-target", 1), ("tiny-target", 8), ("llama-15m", 8)])
def test_scoring(benchmark: BenchmarkFixture, name: str, batch: int, method: str) -> None:
    """Chunks of 48 tokens behind histories of 300 that are known, or are not, or are read by one forward of a batch."""
    backend, ids = endless(name), prompts(batch, HISTORY + CHUNK)
    requests = [Score(f"c{i}", Prompt(row), HISTORY) for i, row in enumerate(ids)]
    rows = torch.tensor(ids)

    @torch.inference_mode()
    def plain() -> Tensor:
        logits: Tensor = backend.model(rows, logits_to_keep=CHUNK + 1, use_cache=False).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, rows[:, HISTORY:, None])[..., 0]

    run: Callable[[], Any] = plain
    if method != "plain forward":
        backend._store.limit = 0 if method == "pyquiet uncached" else 1 << 30
        run = through(backend, requests)
        run()
        answers: list[Scored] = run()
        assert answers[0].usage.cached_tokens == (0 if method == "pyquiet uncached" else HISTORY - 1)
        torch.testing.assert_close(torch.tensor([a.log_probs for a in answers]), plain(), rtol=0, atol=1e-3)
    seconds = best_seconds(benchmark, run, budget=2.0)
    if method != "plain forward":
        backend._worker.close()
    benchmark.extra_info.update(
        table=f"log-probs of chunks of {CHUNK} tokens behind {HISTORY}",
        shape=f"{name}, {batch}",
        method=method,
        seconds=seconds,
    )
