"""ATTS by its front door, with servers as draft and target."""

import asyncio
import warnings
from pathlib import Path

import pytest

from pyquiet.scaling import ATTS, Plan, Pools, Sampling
from pyquiet.scaling.backends.base import GoneError
from pyquiet.scaling.backends.openai import OpenAIBackend
from pyquiet.scaling.calls import Retry
from pyquiet.scaling.journal import read_journal
from pyquiet.scaling.score import MeanNLL

from .loopback import Loopback, serving
from .toy_language import ToyCodec

QUESTIONS = [f"What is {i}?" for i in range(4)]
PLAN = Plan(chains=4, turns=4, draft=Sampling(12), target=Sampling(12), seed=3, pools=Pools(8, 4, 4, inflight=16))
FAULTS = dict.fromkeys(["500", "429", "reset", "garbage", "null", "short"], 0.03)


def atts(draft: Loopback, target: Loopback, **options: float) -> ATTS:
    backends = [OpenAIBackend(s.url, tokenizer=ToyCodec(), probe_every=0.01, **options) for s in (draft, target)]
    return ATTS(*backends, plan=PLAN, score=MeanNLL(min_tokens=1), retry=Retry(tries=40, base=0.001, cap=0.01))


def count(path: Path, stage: str) -> int:
    return sum(r.key.stage == stage and r.timing is not None for r in read_journal(path)[1])


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_run_with_and_without_a_bank_keeps_exact_accounts(calibrated: bool, tmp_path: Path):
    path, bank = tmp_path / "run.jsonl", tmp_path / "bank.jsonl"
    with serving() as draft, serving("sglang", salt=1) as target:
        for server in (draft, target):
            server.mix(FAULTS, seed=1)
        scale = atts(draft, target)
        if calibrated:
            scale.calibrate([f"Which is {i}?" for i in range(6)], chains=2, journal=bank)
        result = scale.run(QUESTIONS, journal=path)
        files = [path, bank] if calibrated else [path]
        assert result.finished
        assert [len(q.chains) for q in result.questions] == [PLAN.chains] * len(QUESTIONS)
        assert {chain.outcome for q in result.questions for chain in q.chains} <= {"answer", "eos", "turns"}
        assert draft.account.good() == sum(count(file, "draft") for file in files)
        assert target.account.good("score") == sum(count(file, "score") for file in files)
        assert target.account.good("generate") == sum(count(file, "target") for file in files)
        assert draft.account.faulty() > 3
        assert target.account.faulty() > 3


def test_addresses_are_enough_and_texts_go_over_the_wire():
    with serving() as draft, serving("sglang", salt=1) as target, warnings.catch_warnings():
        warnings.simplefilter("error")
        result = ATTS(draft.url, f"{target.url}#toy", plan=PLAN, score=MeanNLL(min_tokens=1)).run(QUESTIONS[:1])
        assert len(result.questions[0].chains) == PLAN.chains
        assert all(isinstance(body.get("prompt", body.get("text")), str) for _, body in [*draft.bodies, *target.bodies])


def test_a_run_that_lost_its_server_is_resumed_by_running_it_again(tmp_path: Path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "run.jsonl"
    with serving() as draft, serving("sglang", salt=1) as target:
        wanted = atts(draft, target).run(QUESTIONS, journal=whole)
        seen = 0

        def killing(record: object) -> None:
            nonlocal seen
            seen += 1
            if seen == 40:
                target.inject("die", 600.0)

        with pytest.raises(GoneError, match="resume"):
            atts(draft, target, give_up_s=0.05).run(QUESTIONS, journal=path, on_record=killing)
        kept = len(read_journal(path)[1])
        assert 40 <= kept < len(read_journal(whole)[1])
        asyncio.run_coroutine_threadsafe(target.start(), target.loop).result()
        again = atts(draft, target).run(QUESTIONS, journal=path)
    assert again.answers == wanted.answers
    assert {r.key for r in read_journal(path)[1] if r.key.stage != "lost"} == {r.key for r in read_journal(whole)[1]}
