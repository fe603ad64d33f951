"""Scores of whole runs of trained models, made once more from the records with tokenizer and plain forwards alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import pyquiet
from pyquiet.scaling import ATTS, MeanNLL, Plan, Sampling
from pyquiet.scaling.backends.base import NO_USAGE, Generate, Generated, Prompt, Score, Scored
from pyquiet.scaling.backends.huggingface import HFBackend
from pyquiet.scaling.policy import Chunk
from pyquiet.scaling.records import Decision, Question, Record
from pyquiet.scaling.score import MeanEntropy
from pyquiet.scaling.views import Views

from .small_models import SIZES, TOKENIZER, using_backend

SHARED = Path(__file__).parents[2].parent / "shared" / "models"
MODELS = ["tiny-causal", "tiny-draft", "tiny-target", "stories260K"]
QUESTIONS = ["Ida has 21 pens for 3 €. She gives 2 away. How many pens are left?", "Tom's café 🙂 sells 4 eggs."]


@cache
def real(name: str) -> Any:
    """The model in float64, so that nothing but its own float32 parts is inexact, and its tokenizer."""
    if name == "letters":
        model, tokenizer = letters(), TOKENIZER
    elif name == "stories260K":
        if not (SHARED / name).is_dir():
            pytest.skip(f"no {name}")
        model, tokenizer = (kind.from_pretrained(SHARED / name) for kind in (AutoModelForCausalLM, AutoTokenizer))
    else:
        model, tokenizer = pyquiet.load(name)
    return model.double().eval(), tokenizer


def letters() -> Any:
    """A random model with a tokenizer of bytes, that writes letters alone."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"max_position_embeddings": 512}))
    model.lm_head = torch.nn.Linear(SIZES["hidden_size"], SIZES["vocab_size"])
    with torch.no_grad():
        model.lm_head.bias.fill_(-1e4)[TOKENIZER(ascii_letters).input_ids] = 0
    return model


@torch.no_grad()
def laws(model: Any, ids: Sequence[int], start: int) -> tuple[list[float], list[float]]:
    """Log-probs of the tokens from `start` on, teacher-forced without a cache, and the laws' entropies."""
    law = model(torch.tensor([list(ids)]), use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
    return law[range(len(law)), list(ids[start:])].tolist(), torch.special.entr(law.exp()).sum(-1).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_scores_cached_or_not_are_those_of_a_plain_forward(name: str) -> None:
    model, tokenizer = real(name)
    ids = tuple(tokenizer(f"{QUESTIONS[0]} {QUESTIONS[1]} Tom was happy, and {QUESTIONS[0]}").input_ids)
    middle, near = len(ids) // 2, len(ids) - 9

    async def work(backend: HFBackend) -> list[tuple[int, Scored]]:
        asked = []
        for chain, start in (("cold", 1), ("warm", middle), ("warm", near), ("warm", 1)):
            prompt = Prompt(ids[: len(ids) if start != middle else middle + 9])
            asked.append((start, await backend.score(Score(chain, prompt, start, entropy=True))))
        wrote = await backend.generate(Generate("writes", Prompt(ids[:near]), 12, 0.8, 1.0, 3))
        whole = Prompt(ids[:near] + wrote.ids)
        return [*asked, (-1, await backend.score(Score("writes", whole, near, entropy=True))), (0, wrote)]

    *asked, (_, last), (_, wrote) = using_backend(HFBackend(model, tokenizer), work)
    for start, answer in asked:
        expected = laws(model, ids[: len(ids) if start != middle else middle + 9], start)
        assert answer.log_probs == pytest.approx(expected[0], abs=1e-5)
        assert answer.entropies == pytest.approx(expected[1], abs=1e-5)
    assert [answer.usage.cached_tokens for _, answer in asked] == [0, middle - 1, middle + 9, 0]
    assert last.usage.cached_tokens == near - 1
    assert last.log_probs == pytest.approx(laws(model, ids[:near] + wrote.ids, near)[0], abs=1e-5)


class Alternate:
    """The target continues behind every other chunk."""

    together = False

    def decide(self, chunk: Chunk, uniform: float) -> Decision:
        return Decision("continue" if (chunk.key.turn + chunk.key.chain) % 2 else "accept", "alternate")

    def decide_all(self, chunks: Any, uniforms: Any) -> list[Decision]:
        raise NotImplementedError

    def observe(self, chunk: Chunk, decision: Decision) -> None: ...


def run(draft: str, target: str, **options: Any) -> tuple[list[list[Record]], list[Score]]:
    """The records of each chain in their order, and what the target was asked to score."""
    backends = [HFBackend(*real(name)) for name in (draft, target)]
    asked: list[Score] = []
    score = backends[1].score

    async def noted(request: Score) -> Scored:
        asked.append(request)
        return await score(request)

    backends[1].score = noted  # type: ignore[method-assign]
    plan = Plan(chains=2, turns=4, draft=Sampling(9), target=Sampling(7), seed=5)
    chains: dict[tuple[str, int], list[Record]] = {}
    atts = ATTS(*backends, plan=plan, policy=Alternate(), extract=lambda _: None, **options)
    atts.run(QUESTIONS, on_record=lambda r: chains.setdefault((r.key.question, r.key.chain), []).append(r))
    return list(chains.values()), asked


def written(record: Record, turn: Sequence[Record]) -> bool:
    """Whether what was written stands in the chain."""
    return record.key.stage == "target" or (record.key.stage == "draft" and (len(turn) == 2 or record.finish != "eos"))


def turns(chain: Sequence[Record]) -> list[list[Record]]:
    """Draft, score and, where the target took over, its text."""
    stages = [[r for r in chain if r.key.turn == t and r.key.stage != "end"] for t in range(4)]
    return [stage for stage in stages if stage]


@pytest.mark.parametrize("template", [None, "Q: {question}\nA:"], ids=["chat", "plain"])
@pytest.mark.parametrize("score", [MeanNLL(min_tokens=1), MeanEntropy(min_tokens=1)], ids=["nll", "entropy"])
def test_scores_of_a_run_that_shares_ids(template: Any, score: Any) -> None:
    model, tokenizer = real("tiny-target")
    chains, asked = run("tiny-draft", "tiny-target", template=template, score=score)
    assert len(asked) == sum(r.key.stage == "score" for chain in chains for r in chain) > 12
    assert all(r.prompt.ids.count(tokenizer.bos_token_id) == 1 for r in asked if r.prompt.ids)
    for chain in chains:
        question = QUESTIONS[int(chain[0].key.question)]
        if template is None:
            messages = [{"role": "user", "content": question}]
            head = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
        else:
            head = tokenizer(f"Q: {question}\nA:").input_ids
        ids = tuple(head)
        for turn in turns(chain):
            draft, graded = turn[:2]
            chunk = draft.ids or ()
            log_probs, entropies = laws(model, ids + chunk, len(ids))
            values = [-x for x in log_probs] if isinstance(score, MeanNLL) else entropies
            assert len(values) == len(chunk)  # the first token counts
            assert graded.score == pytest.approx(sum(values) / len(values), abs=1e-5)
            ids += tuple(i for r in turn if written(r, turn) for i in r.ids or ())


@pytest.mark.parametrize("per", ["token", "byte", "sum"])
@pytest.mark.parametrize("target", ["tiny-causal", "stories260K"])
def test_scores_of_a_run_with_two_tokenizers(target: str, per: Any) -> None:
    model, tokenizer = real(target)
    chains, asked = run("letters", target, template="Q: {question}\nA:", score=MeanNLL(per, min_tokens=1))
    for request in asked:
        ids = request.prompt.ids or ()
        assert [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id] == [0]
    for chain in chains:
        text = f"Q: {QUESTIONS[int(chain[0].key.question)]}\nA:"
        for turn in turns(chain):
            draft, graded = turn[:2]
            whole = tokenizer(text + draft.text, return_offsets_mapping=True)
            counted = [i for i, (_, end) in enumerate(whole.offset_mapping) if end > len(text)]
            total = -sum(laws(model, whole.input_ids, counted[0])[0])
            size = {"token": len(counted), "byte": len(draft.text.encode()), "sum": 1}[per]
            assert graded.score == pytest.approx(total / size, abs=1e-5)
            text += "".join(r.text for r in turn if written(r, turn))


@pytest.mark.parametrize("target", ["tiny-causal", "stories260K"])
def test_a_token_counts_where_it_overlaps_the_chunk(target: str) -> None:
    model, tokenizer = real(target)
    text = QUESTIONS[1] + " There was a little house."
    shared_token = 0

    async def work(backend: HFBackend) -> None:
        nonlocal shared_token
        views = Views(HFBackend(*real("letters")), backend, Question("q", text[:12]), template="{question}")
        for cut in range(12, len(text) - 1, 5):
            chunk = Generated((5,), text[cut : cut + 9], "length", NO_USAGE)
            prompt, start = views.with_chunk(chunk)
            whole = tokenizer(text[: cut + 9], return_offsets_mapping=True)
            counted = [i for i, (_, end) in enumerate(whole.offset_mapping) if end > cut]
            shared_token += whole.offset_mapping[counted[0]][0] < cut
            answer = await backend.score(Score("c", prompt, start))
            assert answer.log_probs == pytest.approx(laws(model, whole.input_ids, counted[0])[0], abs=1e-5)
            views.append(Generated((5,), text[cut : cut + 5], "length", NO_USAGE), "draft")

    using_backend(HFBackend(model, tokenizer), work)
    assert shared_token  # with what stood before the chunk
