"""Requests of many chains in one batch: the same answers as alone, and no token read that need not be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from pyquiet.scaling import ATTS, Plan, Sampling
from pyquiet.scaling.backends import reading
from pyquiet.scaling.backends.base import Prompt, RefusedError, Score, Scored
from pyquiet.scaling.backends.huggingface import HFBackend
from pyquiet.scaling.plan import Pools
from pyquiet.scaling.records import Record

from .small_models import TOKENIZER, brute_force, deepseek, gemma, ids_of, llama, mamba, mistral, using, wants

CACHED = [llama, mistral, gemma, deepseek]


def close(answer: Scored, model: Any, ids: tuple[int, ...], start: int) -> bool:
    return answer.log_probs == pytest.approx(brute_force(model, ids, start).tolist(), abs=1e-5)


def watched(model: Any) -> list[torch.Size]:
    """Shapes of the ids that the model reads from now on."""
    shapes: list[torch.Size] = []
    model.base_model.register_forward_pre_hook(
        lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    return shapes


def at_once(requests: Sequence[Any]) -> Callable[[HFBackend], Any]:
    async def work(backend: HFBackend) -> list[Any]:
        ask = [backend.score(r) if isinstance(r, Score) else backend.generate(r) for r in requests]
        return list(await asyncio.gather(*ask))

    return work


@pytest.mark.parametrize("make", [*CACHED, mamba])
def test_scores_and_texts_of_several_lengths_are_those_of_each_alone(make: Any) -> None:
    model = make()
    prompts = [ids_of(i, 12 + 7 * (i % 4)) for i in range(6)]
    scores = [Score(f"s{i}", Prompt(ids), len(ids) - 8, entropy=i % 2 == 0) for i, ids in enumerate(prompts)]
    texts = [wants(i) for i in range(6)]

    async def work(backend: HFBackend) -> Any:
        first = await at_once([*scores, *texts])(backend)
        longer = [Score(s.chain, Prompt((s.prompt.ids or ()) + ids_of(9, 5)), len(s.prompt.ids or ())) for s in scores]
        return first, longer, await at_once([*longer, *texts])(backend)

    first, longer, second = using(model, work)
    for request, answer in zip([*scores, *longer], [*first[:6], *second[:6]], strict=True):
        assert close(answer, model, request.prompt.ids, request.start)
        assert (answer.entropies is not None) == request.entropy
    alone = [using(model, at_once([text]), deterministic=True)[0] for text in texts]
    said = [(a.ids, a.text, a.finish) for a in alone]
    assert [(a.ids, a.text, a.finish) for a in first[6:]] == [(a.ids, a.text, a.finish) for a in second[6:]] == said


def test_scores_of_several_chains_take_one_forward() -> None:
    model = llama()
    prompts = [ids_of(i, 20 + i % 3) for i in range(8)]

    async def work(backend: HFBackend) -> Any:
        await at_once([Score(f"c{i}", Prompt(ids[:10]), 1) for i, ids in enumerate(prompts)])(backend)
        shapes = watched(model)
        return await at_once([Score(f"c{i}", Prompt(ids), 10) for i, ids in enumerate(prompts)])(backend), shapes

    answers, shapes = using(model, work, max_batch=8, max_wait=5.0)
    assert shapes == [(8, 13)]
    assert [answer.usage.cached_tokens for answer in answers] == [9] * 8


def test_short_prompts_are_not_padded_to_a_long_one() -> None:
    model = llama()
    prompts = [ids_of(i, 80 if i == 2 else 10) for i in range(8)]
    shapes = watched(model)
    using(model, at_once([Score(f"c{i}", Prompt(ids), 1) for i, ids in enumerate(prompts)]), max_batch=8, max_wait=5.0)
    assert sorted(shapes[-2:]) == [(1, 80), (7, 10)]


def test_no_forward_and_no_head_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_TOKENS_AT_ONCE", 50)
    monkeypatch.setattr("pyquiet.heads._LOGITS_AT_ONCE", 258 * 7)
    model = llama()
    prompts = [ids_of(i, 20) for i in range(6)]
    shapes, rows = watched(model), list[int]()
    model.lm_head.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    requests = [Score(f"c{i}", Prompt(ids), 9, entropy=True) for i, ids in enumerate(prompts)]
    answers = using(model, at_once(requests), max_batch=6, max_wait=5.0)
    assert shapes[-3:] == [(2, 20)] * 3
    assert rows == [7, 7, 7, 1] * 3
    for answer, ids in zip(answers, prompts, strict=True):
        assert close(answer, model, ids, 9)
        assert len(answer.entropies or ()) == 11


def test_what_chains_begin_with_is_read_once() -> None:
    model = llama()
    question, other = ids_of(1, 40), ids_of(2, 30)
    prompts = [question + ids_of(10 + i, 5) for i in range(3)] + [other + ids_of(20 + i, 5) for i in range(2)]

    async def work(backend: HFBackend) -> Any:
        shapes = watched(model)
        first = await at_once([Score(f"c{i}", Prompt(ids), len(ids) - 4) for i, ids in enumerate(prompts)])(backend)
        backend._worker._max_wait = 0
        late = await backend.score(Score("late", Prompt(question + ids_of(30, 6)), 41))
        return first, late, shapes

    first, late, shapes = using(model, work, max_batch=5, max_wait=5.0)
    assert shapes == [(2, 40), (5, 5), (1, 6)]
    assert [a.usage.prompt_tokens - a.usage.cached_tokens for a in first] == [45, 5, 5, 35, 5]
    assert late.usage.cached_tokens == 40
    for answer, ids in zip(first, prompts, strict=True):
        assert close(answer, model, ids, len(ids) - 4)
    assert close(late, model, question + ids_of(30, 6), 41)


@pytest.mark.parametrize("make", CACHED)
def test_what_was_pushed_out_is_read_again_and_says_the_same(make: Any) -> None:
    model, prompts = make(), [ids_of(i, 20) for i in range(5)]
    requests = [Score(f"c{i}", Prompt(ids), 12) for i, ids in enumerate(prompts)]

    async def work(backend: HFBackend) -> Any:
        await at_once(requests)(backend)
        kept = backend.kept_bytes
        backend._store.limit = kept * 2 // 5  # room for two
        await backend.score(requests[4])
        assert backend.kept_bytes <= kept * 2 // 5
        return [await backend.score(request) for request in (requests[4], *requests)]

    answers = using(model, work)
    assert [answer.usage.cached_tokens for answer in answers] == [11, 0, 0, 0, 0, 0]
    for answer, ids in zip(answers, (prompts[4], *prompts), strict=True):
        assert close(answer, model, ids, 12)


@pytest.mark.parametrize("make", CACHED)
def test_a_chunk_that_was_replaced_is_not_remembered(make: Any) -> None:
    model, rejected = make(), ids_of(1, 30)
    replaced = rejected[:20] + ids_of(2, 12)

    async def work(backend: HFBackend) -> Any:
        await backend.score(Score("c", Prompt(rejected), 20))
        return await backend.score(Score("c", Prompt(replaced), 26))

    answer = using(model, work)
    assert answer.usage.cached_tokens == 20
    assert close(answer, model, replaced, 26)


def test_one_broken_text_spoils_no_other() -> None:
    model = llama()
    bad = 250  # an id whose embedding is no number
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = torch.nan
    sound = [i for i in range(6) if bad not in (wants(i).prompt.ids or ())]
    texts = [wants(i, max_tokens=12) for i in sound]
    broken = wants(9, prompt=Prompt((*ids_of(1, 30), bad)))

    async def work(backend: HFBackend) -> list[Any]:
        first = await asyncio.gather(*map(backend.generate, [broken, *texts]), return_exceptions=True)
        return [*first, *await at_once(texts)(backend)]

    refused, *rest = using(model, work)
    assert isinstance(refused, RefusedError)
    alone = [using(model, at_once([text]), deterministic=True)[0] for text in texts]
    assert [(a.ids, a.finish) for a in rest] == [(a.ids, a.finish) for a in alone] * 2


@pytest.mark.parametrize("pools", [Pools(1, 1, 1, 1), Pools(64, 64, 64, 64)])
def test_engines_and_batches_change_no_transcript(pools: Pools) -> None:
    def transcripts(engine: Any, pools: Pools) -> tuple[list[Any], list[float | None]]:
        records: list[Record] = []
        plan = Plan(chains=4, turns=3, draft=Sampling(12), target=Sampling(12), stop=("a",), pools=pools)
        pair = [HFBackend(make(), TOKENIZER) for make in (llama, mistral)]
        atts = ATTS(*pair, plan=plan, takeover_rate=0.5)
        atts.run(["What is one and two?", "How many are three?"], engine=engine, on_record=records.append)
        records.sort(key=lambda r: repr(r.key))
        return [(r.key, r.ids, r.text, r.decision, r.outcome, r.answer) for r in records], [r.score for r in records]

    expected, scores = transcripts("sync", Pools())
    assert {row[3].action for row in expected if row[3]} == {"accept", "continue"}
    got, others = transcripts("async", pools)
    assert got == expected
    assert others == [x if x is None else pytest.approx(x, abs=1e-5) for x in scores]
