"""Models in this process against plain forwards of the same models."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import pyquiet
from pyquiet.heads import cache_argument
from pyquiet.randomness import Purpose, Stream, draw
from pyquiet.scaling.backends.base import Choose, ContextOverflowError, Generated, Prompt, RefusedError, Score
from pyquiet.scaling.backends.decoding import _DRAWS
from pyquiet.scaling.backends.huggingface import HFBackend

from .small_models import TOKENIZER, brute_force, deepseek, gemma, ids_of, llama, mamba, mistral, using, wants


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("start", [1, 9, 19])
def test_scores_are_those_of_a_plain_forward(make: Any, start: int) -> None:
    model, ids = make(), ids_of(3, 20)

    async def work(backend: HFBackend) -> Any:
        await backend.score(Score("c", Prompt(ids[:12]), 5))  # leaves a part in the cache
        return await backend.score(Score("c", Prompt(ids), start))

    answer = using(model, work)
    assert torch.tensor(answer.log_probs).numpy() == pytest.approx(brute_force(model, ids, start).numpy(), abs=1e-5)
    assert answer.usage.cached_tokens == min(12, start - 1)


@pytest.mark.parametrize("make", [llama, mistral])
def test_a_batch_writes_what_each_request_writes_alone(make: Any) -> None:
    requests = [wants(i) for i in range(9)]

    async def together(backend: HFBackend) -> list[Generated]:
        return list(await asyncio.gather(*map(backend.generate, requests)))

    async def alone(backend: HFBackend) -> list[Generated]:
        return [await backend.generate(request) for request in requests]

    expected = using(make(), alone, deterministic=True)
    assert using(make(), together, max_batch=4) == expected
    assert len({answer.ids for answer in expected}) == len(expected)


@pytest.mark.parametrize("thinks", [False, True])
def test_ids_that_the_tokenizer_has_no_word_for_are_never_written(thinks: bool) -> None:
    """A vocabulary that is padded for speed, its logits the largest of all."""
    model = llama()
    model.resize_token_embeddings(320, mean_resizing=False)
    model.lm_head = torch.nn.Linear(32, 320, dtype=torch.float64)
    model.lm_head.bias.data[len(TOKENIZER) :] = 50.0
    if thinks:
        model = pyquiet.QuietStarForCausalLM.from_base(model, thought_tokens=2, start_init=7).eval()

    async def work(backend: HFBackend) -> list[Generated]:
        return list(await asyncio.gather(*(backend.generate(wants(i, temperature=i % 2)) for i in range(4))))

    written = [i for answer in using(model, work) for i in answer.ids]
    assert len(written) > 8
    assert max(written) < len(TOKENIZER)


def test_a_takeover_reads_one_token_after_a_score() -> None:
    ids = ids_of(4, 30)

    async def work(backend: HFBackend) -> Any:
        await backend.score(Score("c0", Prompt(ids), 20))
        warm = await backend.generate(wants(0, prompt=Prompt(ids)))
        size = backend.kept_bytes
        backend.forget("c0")
        return warm, await backend.generate(wants(0, prompt=Prompt(ids))), size

    warm, cold, size = using(llama(), work)
    assert (warm.usage.cached_tokens, cold.usage.cached_tokens) == (29, 0)
    assert (warm.ids, warm.text) == (cold.ids, cold.text)
    assert size == (30 + len(warm.ids) - 1) * 2 * 2 * 2 * 8 * 8


def test_the_cache_stays_below_its_cap() -> None:
    async def work(backend: HFBackend) -> Any:
        for i in range(4):
            await backend.score(Score(f"c{i}", Prompt(ids_of(i, 10)), 2))
            assert backend.kept_bytes <= 8000
        return [(await backend.score(Score(f"c{i}", Prompt(ids_of(i, 10)), 9))).usage.cached_tokens for i in (3, 0)]

    assert using(llama(), work, cache_bytes=8000) == [8, 0]  # 5,120 bytes a chain


def test_stop_strings_end_the_text_over_several_tokens() -> None:
    async def work(backend: HFBackend) -> Any:
        whole = await backend.generate(wants(1, max_tokens=40))
        stop = whole.text[5:8]
        return whole, stop, await backend.generate(wants(1, max_tokens=40, stop=("never", stop)))

    whole, stop, cut = using(llama(), work)
    end = whole.text.index(stop) + len(stop)
    assert (cut.text, cut.finish) == (whole.text[:end], "stop")
    assert len(cut.ids) < len(whole.ids)


def test_a_cancelled_request_leaves_and_others_go_on() -> None:
    async def work(backend: HFBackend) -> Any:
        long = asyncio.ensure_future(backend.generate(wants(1, max_tokens=100)))
        other = asyncio.ensure_future(backend.generate(wants(2, max_tokens=20)))
        await asyncio.sleep(0.02)
        long.cancel()
        answer = await other
        async with asyncio.timeout(60):  # for ever, if it did not leave
            while backend._worker._runner.running():
                await asyncio.sleep(0.005)
        return long.cancelled(), answer

    cancelled, answer = using(llama(), work)
    assert cancelled
    assert answer == using(llama(), lambda backend: backend.generate(wants(2, max_tokens=20)))


def test_a_backend_that_was_closed_before_it_was_opened_opens() -> None:
    async def work() -> Generated:
        backend = HFBackend(llama(), TOKENIZER)
        await backend.close()
        await backend.open()
        try:
            return await backend.generate(wants(0))
        finally:
            await backend.close()

    assert asyncio.run(work()).ids


def test_what_cannot_be_is_refused_before_anything_runs() -> None:
    async def work(backend: HFBackend) -> None:
        backend._worker.submit = None  # type: ignore[assignment,method-assign]
        with pytest.raises(ContextOverflowError, match="pass the context of 128"):
            await backend.generate(wants(0, max_tokens=126))
        for prompt in (Prompt(()), Prompt((999,))):
            with pytest.raises(RefusedError, match="a prompt must hold"):
                await backend.generate(wants(0, prompt=prompt))
        for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": 0}):
            with pytest.raises(RefusedError, match=f"{next(iter(wrong))} must be"):
                await backend.generate(wants(0, **wrong))
        with pytest.raises(RefusedError, match="must start at token 1"):
            await backend.score(Score("c", Prompt((2, 3)), 0))

    using(llama(), work)


def test_a_failing_model_tells_those_who_wait_and_lives_on() -> None:
    model = llama()
    backend_forward = model.model.forward

    async def work(backend: HFBackend) -> Any:
        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("no memory")

        model.model.forward = broken
        with pytest.raises(RuntimeError, match="no memory"):
            await backend.generate(wants(0))
        model.model.forward = backend_forward
        return await backend.generate(wants(0))

    assert using(model, work).finish


def test_options_have_the_probability_of_their_tokens() -> None:
    model, ids = llama(), ids_of(5, 10)
    options = ("0", "7", "12")
    encoded = [HFBackend(model, TOKENIZER)._codec.encode(option).ids for option in options]
    got = using(model, lambda backend: backend.choose(Choose("c", Prompt(ids), options)))
    assert got.log_probs == pytest.approx([float(brute_force(model, ids + option, 10).sum()) for option in encoded])
    read = [10, *(10 + len(option) for option in encoded)]  # what all options have in common, and each of them
    assert got.usage.prompt_tokens == sum(read)
    assert 3 * 8 <= got.usage.cached_tokens < sum(read) - 10


def thinker() -> Any:
    model = pyquiet.QuietStarForCausalLM.from_base(llama(), thought_tokens=2, start_init=7)
    torch.manual_seed(1)
    torch.nn.init.uniform_(model.mixing_head[-1].weight, 0, 0.2)
    return model.eval()


def test_a_thinking_model_writes_the_same_in_a_batch_and_alone() -> None:
    requests = [wants(i, max_tokens=4 + i) for i in range(3)]

    async def together(backend: HFBackend) -> list[Generated]:
        return list(await asyncio.gather(*map(backend.generate, requests)))

    async def alone(backend: HFBackend) -> list[Generated]:
        return [await backend.generate(request) for request in requests]

    expected = using(thinker(), alone, deterministic=True)
    assert using(thinker(), together) == expected
    assert [len(answer.ids or ()) for answer in expected if answer.finish == "length"]


def test_a_thinking_target_scores_with_its_thoughts() -> None:
    model, ids = thinker(), ids_of(6, 12)
    answer = using(model, lambda backend: backend.score(Score("c", Prompt(ids), 7)))
    assert len(answer.log_probs) == 5
    plain = brute_force(model.base, ids, 7)
    assert torch.tensor(answer.log_probs).sub(plain).abs().max() > 1e-3
    assert using(model, lambda backend: backend.score(Score("d", Prompt(ids), 7))) == answer
    with pytest.raises(RefusedError, match="tells no entropies"):
        using(model, lambda backend: backend.score(Score("c", Prompt(ids), 7, entropy=True)))


@pytest.mark.parametrize("top_k", [None, 3])
def test_tokens_are_drawn_by_the_seed_and_their_place(top_k: int | None) -> None:
    model, request = llama(), wants(3, max_tokens=8, top_k=top_k)
    ids, seed = list(request.prompt.ids or ()), request.seed
    for i in range(8):
        stream = Stream(_DRAWS, Purpose.ANSWER, sequence=seed % 2**32, step=seed >> 32, position=i)
        logits = model(torch.tensor([ids])).logits[:, -1]
        ids.append(int(draw(logits.detach(), stream=stream, temperature=0.9, top_k=top_k, top_p=0.95).tokens))
    answer = using(model, lambda backend: backend.generate(request))
    assert answer.ids == tuple(ids[-8:])


def test_a_thinking_model_draws_from_the_likeliest_tokens_alone() -> None:
    async def work(backend: HFBackend) -> list[Generated]:
        return [await backend.generate(wants(2, **law)) for law in ({"top_k": 1}, {"temperature": 0.0}, {})]

    one, greedy, drawn = using(thinker(), work)
    assert one == greedy
    assert one.ids != drawn.ids


def test_a_thinking_model_draws_by_the_seed() -> None:
    async def work(backend: HFBackend) -> list[Generated]:
        return [await backend.generate(wants(2, seed=seed, max_tokens=8)) for seed in (1, 1, 2)]

    first, again, other = using(thinker(), work)
    assert first == again
    assert first.ids != other.ids


@pytest.mark.parametrize("make", [llama, mistral, gemma, deepseek])
def test_a_tokens_keys_and_values_are_measured_by_a_cache(make: Any) -> None:
    model, ids, cache = make(), torch.tensor([ids_of(3, 20)]), DynamicCache()
    model.base_model(ids, use_cache=True, **{cache_argument(type(model.base_model)): cache})
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    assert HFBackend(model, TOKENIZER).kv_bytes_per_token == held / 20
    if make is llama:
        assert held / 20 == 2 * 2 * 2 * 8 * 8  # keys and values, layers, heads, head size, float64


def test_where_more_than_keys_and_values_is_held_nobody_says_how_much() -> None:
    for model in (mamba(), thinker()):
        assert HFBackend(model, TOKENIZER).kv_bytes_per_token is None
