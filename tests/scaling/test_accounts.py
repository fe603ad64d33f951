"""Accounts add up whatever becomes of requests: what models were asked is what records tell, lost requests too."""

import asyncio
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyquiet.scaling import ATTS, Bank, Plan, Pooled, Pools, RankPolicy, Report, Retry, Sampling, read_journal
from pyquiet.scaling.backends.base import ContextOverflowError, GoneError, RefusedError, TransientError
from pyquiet.scaling.records import Record
from pyquiet.scaling.score import MeanNLL

from .fake_models import Faulty, HashModel

PLAN = Plan(chains=4, turns=4, draft=Sampling(40), target=Sampling(40), pools=Pools(4, 3, 2, 8))
ASKED = [f"Asked {i}?" for i in range(6)]


def tried(records: list[Record]) -> Counter[str]:
    """Sendings that records tell of, by stage."""
    counted: Counter[str] = Counter()
    for record in records:
        if record.timing is not None:
            counted[record.stage] += record.timing.tries
    return counted


def run(journal: Path, plan: Plan = PLAN, engine: Any = "async", **options: Any) -> tuple[list[HashModel], Any]:
    """A run, until its end or an error; its models, and what came of it."""
    models = options.pop("models", None) or [HashModel(name, latency=1e-3) for name in ("draft", "target")]
    options = {"score": MeanNLL(min_tokens=1), "retry": Retry(tries=2, base=0), "on_score_failure": "fail"} | options
    call = {name: options.pop(name) for name in ("on_record", "grace") if name in options}
    try:
        return models, ATTS(*models, plan=plan, **options).run(ASKED, journal=journal, engine=engine, **call)
    except (RefusedError, GoneError, RuntimeError) as error:
        return models, error


def check(journal: Path, *asked: list[HashModel]) -> list[Record]:
    """Every request that a model met is on file, and the report counts it."""
    header, records = read_journal(journal)
    met: Counter[str] = Counter()
    for draft, target in asked:
        met["draft"] += len(draft.requests)
        met["score"] += sum(kind in ("score", "choose") for kind in target.requests)
        met["target"] += target.requests.count("generate")
    assert tried(records) == +met
    report = Report.of(header, records)
    for stage, cost in report.cost.items():
        before = report.calibration_cost[stage]
        assert cost.sent + before.sent == met[stage]
        lost = [r for r in records if r.key.stage == "lost" and r.stage == stage]
        assert cost.lost + before.lost == len(lost)
    return [record for record in records if record.key.stage == "lost"]


def faulty(share: float) -> list[HashModel]:
    return [HashModel(name, faults=share, latency=1e-3, rng=5) for name in ("draft", "target")]


@pytest.mark.parametrize("engine", ["async", "sync"])
@pytest.mark.parametrize("calibration", [None, Pooled(Bank([0.5, 1.0, 1.5, 2.0]))])
def test_requests_that_are_given_up(engine: Any, calibration: Any, tmp_path: Path) -> None:
    models, result = run(tmp_path / "run.jsonl", engine=engine, models=faulty(0.4), calibration=calibration)
    lost = check(tmp_path / "run.jsonl", models)
    assert result.report.outcomes["failed"] > 2
    assert {record.outcome for record in lost} == {"failed"}
    assert {record.timing.tries for record in lost if record.timing} == {2}
    assert ({record.key.phase for record in lost} == {"run", "presample"}) == (calibration is None)
    again, second = run(tmp_path / "run.jsonl", engine=engine, calibration=calibration)
    assert not any(model.requests for model in again)  # a chunk that failed beforehand is not drafted again
    assert second.report == result.report


def test_scores_that_fail_do_not_end_their_chain_and_are_counted(tmp_path: Path) -> None:
    models = [HashModel("draft"), HashModel("target", faults=0.5)]
    models, result = run(tmp_path / "run.jsonl", models=models, on_score_failure="takeover", retry=Retry(1))
    lost = check(tmp_path / "run.jsonl", models)
    assert Counter(record.stage for record in lost)["score"] > result.report.reasons["failed"] > 0


@pytest.mark.parametrize("plan", [{"early_majority": True, "chains": 12}, {"chain_seconds": 0.004}])
def test_requests_of_chains_that_are_cancelled(plan: dict[str, Any], tmp_path: Path) -> None:
    models = [HashModel(name, answers=0.4, latency=3e-3) for name in ("draft", "target")]
    models, result = run(tmp_path / "run.jsonl", replace(PLAN, **plan), models=models)
    lost = check(tmp_path / "run.jsonl", models)
    assert result.finished
    assert "cancelled" in {record.outcome for record in lost}


@pytest.mark.parametrize("engine", ["async", "sync"])
@pytest.mark.parametrize("error", [RefusedError("no"), GoneError("away"), ContextOverflowError("long")])
def test_an_end_in_the_middle_and_what_goes_on_from_it(error: Exception, engine: Any, tmp_path: Path) -> None:
    journal = tmp_path / "run.jsonl"
    first, _ = run(journal, engine=engine, models=[HashModel("draft", latency=1e-3), Faulty("target", error, 40)])
    check(journal, first)
    second, result = run(journal, engine=engine)
    assert result.finished
    assert check(journal, first, second)


def test_chains_that_are_ranked_together(tmp_path: Path) -> None:
    models, _ = run(tmp_path / "run.jsonl", engine="sync", models=faulty(0.3), policy=RankPolicy(1))
    assert check(tmp_path / "run.jsonl", models)


@pytest.mark.parametrize("error", [RefusedError("no"), GoneError("away")])
def test_scores_that_wait_to_be_ranked_are_counted_when_one_of_them_fails(error: Exception, tmp_path: Path) -> None:
    class Last(HashModel):
        """Answers three scores at once, and fails at the fourth then."""

        async def score(self, request: Any) -> Any:
            if len(self.requests) != 3:
                return await super().score(request)
            self.requests.append("score")
            await asyncio.sleep(0.02)
            raise error

    journal = tmp_path / "run.jsonl"
    first, _ = run(journal, engine="sync", models=[HashModel("draft"), Last("target")], policy=RankPolicy(1))
    lost = check(journal, first)
    assert Counter(record.outcome for record in lost) == {"failed": 1, "cancelled": 3}
    assert sum(record.usage.prompt_tokens > 0 for record in lost) == 3  # what they read is known, and paid for
    second, result = run(journal, engine="sync", policy=RankPolicy(1))
    assert result.finished
    check(journal, first, second)
    wanted = run(tmp_path / "whole.jsonl", engine="sync", policy=RankPolicy(1))[1]
    assert result.questions == wanted.questions


@pytest.mark.parametrize(("policy", "engine"), [(None, "async"), (RankPolicy(1), "sync")])
def test_a_crash_loses_no_account(policy: Any, engine: Any, tmp_path: Path) -> None:
    journal, seen = tmp_path / "run.jsonl", Counter[str]()

    def crash(record: Record) -> None:
        seen[record.stage] += 1
        if seen["score"] == 21:  # in the middle of a turn
            seen.clear()
            raise RuntimeError("crash")

    first, error = run(journal, on_record=crash, policy=policy, engine=engine)
    assert str(error) == "crash"
    lost = check(journal, first)
    assert {record.outcome for record in lost} == {"cancelled"}
    second, result = run(journal, policy=policy, engine=engine)
    assert result.finished
    assert len(check(journal, first, second)) == len(lost)


def pressing(times: int) -> Callable[[Record], None]:
    seen: list[Record] = []

    def press(record: Record) -> None:
        seen.append(record)
        if 40 <= len(seen) < 40 + times:
            os.kill(os.getpid(), signal.SIGINT)

    return press


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
@pytest.mark.parametrize(("times", "grace"), [(1, 0.0), (2, 30.0)])
def test_what_ctrl_c_breaks_off_is_on_file_and_gives_what_there_is(times: int, grace: float, tmp_path: Path) -> None:
    journal = tmp_path / "run.jsonl"
    models = [HashModel(name, latency=0.02) for name in ("draft", "target")]
    first, half = run(journal, on_record=pressing(times), grace=grace, models=models)
    assert not half.finished
    assert {record.outcome for record in check(journal, first)} == {"cancelled"}
    second, whole = run(journal)
    assert whole.finished
    check(journal, first, second)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_with_time_ctrl_c_loses_nothing_even_of_banks_that_are_being_filled(tmp_path: Path) -> None:
    first, half = run(tmp_path / "run.jsonl", on_record=pressing(1))  # the 40th record is of a first chunk
    assert not half.finished
    assert check(tmp_path / "run.jsonl", first) == []


def test_a_lost_request_ends_before_the_run_does(tmp_path: Path) -> None:
    """Of a bank that was being filled too: nothing is left running when a run has failed."""

    class Slow(HashModel):
        async def score(self, request: Any) -> Any:
            raise RefusedError("no")

    async def go() -> None:
        models = [HashModel("draft", latency=0.05), Slow("target")]
        with pytest.raises(RefusedError):
            await ATTS(*models, plan=PLAN, score=MeanNLL(min_tokens=1)).arun(ASKED, journal=tmp_path / "run.jsonl")
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(go())


def test_errors_that_pass_are_no_loss(tmp_path: Path) -> None:
    models = [Faulty("draft", TransientError("once"), 7), HashModel("target")]
    models, result = run(tmp_path / "run.jsonl", models=models)
    assert check(tmp_path / "run.jsonl", models) == []
    assert result.report.cost["draft"].retries + result.report.calibration_cost["draft"].retries == 1


def test_a_chunk_that_is_too_short_to_be_scored_is_no_request(tmp_path: Path) -> None:
    models, result = run(tmp_path / "run.jsonl", score=MeanNLL(min_tokens=8), calibration=Pooled(Bank([0.5, 1.0])))
    check(tmp_path / "run.jsonl", models)
    assert result.report.reasons["short"] > 5


def test_peaks_are_told_in_bytes_where_a_model_says_what_a_token_takes(tmp_path: Path) -> None:
    class Measured(HashModel):
        kv_bytes_per_token = 24

    for target, bytes_ in ((Measured("target"), 24), (HashModel("target"), None)):
        journal = tmp_path / f"{bytes_}.jsonl"
        _, result = run(journal, models=[HashModel("draft"), target])
        report, peak = result.report, result.report.peak_target_tokens
        assert peak > 0
        assert report.kv_bytes_peak == (None if bytes_ is None else 24 * peak)
        assert Report.of(*read_journal(journal)) == report
