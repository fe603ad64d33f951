"""Engines: the same transcripts whoever waits for whom, resumption, cancellation, and time on a virtual clock."""

import asyncio
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from pyquiet.scaling.answers import extract
from pyquiet.scaling.backends.base import Backend, ContextOverflowError, GoneError, RefusedError
from pyquiet.scaling.calls import Retry
from pyquiet.scaling.engine import run_async, run_sync
from pyquiet.scaling.limits import TakeoverLimit
from pyquiet.scaling.panel import Panel
from pyquiet.scaling.plan import Plan, Pools, Sampling
from pyquiet.scaling.policy import Chunk, RankPolicy
from pyquiet.scaling.records import Decision, Key, Question, Record
from pyquiet.scaling.score import MeanNLL
from pyquiet.scaling.session import Session, Setting
from pyquiet.scaling.simulation import Delayed, Latency, run_simulated
from pyquiet.scaling.views import Views

from .fake_models import HashModel

QUESTIONS = [Question(f"q{i}", f"What is {i}?") for i in range(3)]
PLAN = Plan(chains=4, turns=5, draft=Sampling(40), target=Sampling(40), seed=7)


class Threshold:
    """Takes over where the score is above a cut."""

    together = False

    def __init__(self, action: str = "continue", cut: float = 1.0, resamples: int = 2) -> None:
        self.action, self.cut, self.resamples = action, cut, resamples
        self.seen: list[Key] = []

    def decide(self, chunk: Chunk, uniform: float) -> Decision:
        if chunk.score is None or chunk.score <= self.cut:
            return Decision("accept", "test")
        if self.action == "resample" and chunk.key.attempt >= self.resamples:
            return Decision("accept", "resampled")
        return Decision(self.action, "test", p=uniform)  # type: ignore[arg-type]

    def decide_all(self, chunks: Sequence[Chunk], uniforms: Sequence[float]) -> list[Decision]:
        raise NotImplementedError

    def observe(self, chunk: Chunk, decision: Decision) -> None:
        self.seen.append(chunk.key)


class Paper:
    """A journal in memory that refuses what a journal refuses."""

    def __init__(self, records: Iterable[Record] = (), crash_after: int | None = None) -> None:
        self.records = list(records)
        self.keys = {record.key for record in self.records}
        self.crash_after = crash_after

    def commit(self, record: Record) -> None:
        if self.crash_after is not None and len(self.records) >= self.crash_after:
            raise RuntimeError("crash")
        assert record.key not in self.keys, f"{record.key} is committed twice"
        self.keys.add(record.key)
        self.records.append(record)


def setting(draft: Backend, target: Backend, policy: Any = None, plan: Plan = PLAN, **options: Any) -> Setting:
    return Setting(
        plan, draft, target, options.pop("score", MeanNLL(min_tokens=1)), policy or Threshold(),
        lambda q: Views(draft, target, q), extract, retry=options.pop("retry", Retry(base=0)), **options,
    )  # fmt: skip


async def run(
    made: Setting,
    engine: Callable[[Session, Iterable[Panel]], Any] = run_async,
    paper: Any = None,
    done: Iterable[Record] = (),
    questions: Sequence[Question] = QUESTIONS,
) -> list[Panel]:
    session = Session(made, paper, done)
    panels = [
        Panel(question, i, range(made.plan.chains), made.plan.early_majority) for i, question in enumerate(questions)
    ]
    await engine(session, panels)
    return panels


def transcript(records: Iterable[Record]) -> list[Record]:
    """What must be the same: all but timings and lost requests, in the order of the keys."""
    kept = (replace(record, timing=None) for record in records if record.key.stage != "lost")
    return sorted(kept, key=lambda record: record.key)


def reference(policy: Any = None, plan: Plan = PLAN) -> list[Record]:
    paper = Paper()
    asyncio.run(run(setting(HashModel("draft"), HashModel("target"), policy, plan), run_sync, paper))
    return transcript(paper.records)


@pytest.mark.parametrize("action", ["continue", "replace", "resample"])
@pytest.mark.parametrize("slots", [1, 4, 16, 1000])
def test_async_equals_sync_at_any_concurrency(action: str, slots: int) -> None:
    """Spec 16, T8: 20 seeds of latencies, 5 % of the requests fail and are sent again."""
    plan = replace(PLAN, pools=Pools(slots, slots, slots, slots))
    wanted = reference(Threshold(action))
    assert len({record.key.stage for record in wanted}) == (3 if action == "resample" else 4)
    for rng in range(20):
        paper = Paper()
        draft, target = (HashModel(n, faults=0.05, latency=1e-4, rng=rng) for n in ("draft", "target"))
        asyncio.run(run(setting(draft, target, Threshold(action), plan), paper=paper))
        assert transcript(paper.records) == wanted
        assert draft.peak <= slots
        assert target.peak <= 2 * slots


@pytest.mark.parametrize("engine", [run_async, run_sync])
@pytest.mark.parametrize("slots", [1, 16])
def test_a_virtual_clock_changes_no_transcript(engine: Any, slots: int) -> None:
    paper = Paper()
    plan = replace(PLAN, pools=Pools(slots, slots, slots, slots))
    delayed = [Delayed(HashModel(n), Latency(1.0, cv=1.0)) for n in ("draft", "target")]
    run_simulated(run(setting(*delayed, plan=plan), engine, paper))
    assert transcript(paper.records) == reference(plan=plan)


def test_other_seeds_give_other_transcripts() -> None:
    assert reference() != reference(plan=replace(PLAN, seed=8))


def test_the_sync_engine_finishes_a_stage_before_the_next() -> None:
    paper = Paper()
    delayed = [Delayed(HashModel(n), Latency(1.0, cv=1.0)) for n in ("draft", "target")]
    run_simulated(run(setting(*delayed), run_sync, paper))
    ends: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    for record in paper.records:
        if record.timing is not None:
            ends.setdefault((record.key.question, record.key.turn, record.key.stage), []).append(
                (record.timing.queued, record.timing.ended)
            )
    order = {"draft": 0, "score": 1, "target": 2}
    groups = sorted(ends, key=lambda key: (key[0], key[1], order[key[2]]))
    for before, after in itertools.pairwise(groups):
        assert max(end for _, end in ends[before]) <= min(start for start, _ in ends[after]) + 1e-9


@pytest.mark.parametrize("engine", [run_async, run_sync])
def test_resumes_from_every_prefix_of_the_journal(engine: Any) -> None:
    """Spec 16, T9: the identical end, and no committed stage is executed again."""
    whole = Paper()
    questions = QUESTIONS[:2]
    plan = replace(PLAN, chains=3, pools=Pools(2, 2, 2, 3))
    models = [HashModel(n, latency=1e-4) for n in ("draft", "target")]
    panels = asyncio.run(run(setting(*models, plan=plan), engine, whole, questions=questions))
    requests = sum(len(model.requests) for model in models)
    results = [sorted(panel.results, key=lambda r: r.number) for panel in panels]
    for cut in range(len(whole.records) + 1):
        kept = whole.records[:cut]
        paper, models = Paper(kept), [HashModel(n, latency=1e-4, rng=cut) for n in ("draft", "target")]
        panels = asyncio.run(run(setting(*models, plan=plan), engine, paper, kept, questions))
        assert transcript(paper.records) == transcript(whole.records)
        assert [sorted(panel.results, key=lambda r: r.number) for panel in panels] == results
        spared = sum(record.timing is not None for record in kept)
        assert sum(len(model.requests) for model in models) == requests - spared


def test_a_crash_while_running_loses_nothing() -> None:
    wanted = reference()
    paper = Paper(crash_after=10)
    for crash in (10, 25, None):
        paper = Paper(paper.records, crash_after=crash)
        work = run(setting(HashModel("draft"), HashModel("target")), paper=paper, done=list(paper.records))
        if crash is None:
            asyncio.run(work)
        else:
            with pytest.raises(RuntimeError, match="crash"):
                asyncio.run(work)
            assert len(paper.records) == crash
    assert transcript(paper.records) == wanted


def test_resumed_policies_have_seen_what_was_decided() -> None:
    whole, first = Paper(), Threshold()
    asyncio.run(run(setting(HashModel("draft"), HashModel("target"), first), paper=whole))
    second = Threshold()

    async def again() -> None:
        session = Session(setting(HashModel("draft"), HashModel("target"), second), None, whole.records)
        session.recall(QUESTIONS)

    asyncio.run(again())
    assert second.seen == first.seen
    assert first.seen == [record.key for record in whole.records if record.key.stage == "score"]


def test_requests_that_never_go_well_end_their_chain_alone() -> None:
    paper = Paper()
    broken = HashModel("target", faults=1.0)
    panels = asyncio.run(run(setting(HashModel("draft"), broken, Threshold(cut=-1.0)), paper=paper))
    assert all(panel.complete for panel in panels)
    outcomes = {record.outcome for record in paper.records if record.key.stage == "end"}
    assert outcomes == {"answer", "eos", "turns"}  # the score failed, and the policy accepts what has none
    assert {record.reason for record in paper.records if record.key.stage == "score"} == {"failed"}
    assert len(broken.requests) == 6 * sum(record.key.stage == "score" for record in paper.records)

    panels = asyncio.run(run(setting(HashModel("draft", faults=1.0), HashModel("target"))))
    assert {result.outcome for panel in panels for result in panel.results} == {"failed"}


class Failing(HashModel):
    def __init__(self, error: Exception, after: int) -> None:
        super().__init__("target")
        self.error, self.after, self.asked = error, after, 0

    async def score(self, request: Any) -> Any:
        self.after, self.asked = self.after - 1, self.asked + 1
        if self.after < 0:
            raise self.error
        return await super().score(request)


@pytest.mark.parametrize("policy", [None, RankPolicy(1)])
def test_a_text_that_outgrows_the_targets_context_ends_its_chain_alone(policy: Any) -> None:
    target = Failing(ContextOverflowError("too long"), 5)
    panels = asyncio.run(run(setting(HashModel("draft"), target, policy), run_sync))
    outcomes = [result.outcome for panel in panels for result in panel.results]
    assert len(outcomes) == PLAN.chains * len(QUESTIONS)
    assert outcomes.count("context") == target.asked - 5 > 0


@pytest.mark.parametrize("error", [RefusedError("no log-probabilities"), GoneError("away")])
@pytest.mark.parametrize("engine", [run_async, run_sync])
def test_what_cannot_go_on_stops_the_run_and_resumes(error: Exception, engine: Any) -> None:
    paper = Paper()
    with pytest.raises(type(error), match=str(error)):
        asyncio.run(run(setting(HashModel("draft"), Failing(error, 5)), engine, paper))
    asyncio.run(run(setting(HashModel("draft"), HashModel("target")), engine, paper, list(paper.records)))
    assert transcript(paper.records) == reference()


def test_drafts_go_on_alone_if_asked_to() -> None:
    paper = Paper()
    target = Failing(GoneError("away"), 5)
    panels = asyncio.run(run(setting(HashModel("draft"), target, degrade="draft_only"), paper=paper))
    assert all(panel.complete for panel in panels)
    reasons = [record.decision.reason for record in paper.records if record.decision is not None]
    assert reasons.count("test") <= 5
    assert "forced" in reasons


def test_early_majority_cancels_what_cannot_matter_and_resumes() -> None:
    plan = replace(PLAN, chains=16, turns=8, early_majority=True)

    def models() -> list[Delayed]:
        return [Delayed(HashModel(n, answers=0.3), Latency(1.0, cv=1.0)) for n in ("draft", "target")]

    paper = Paper()
    panels = run_simulated(run(setting(*models(), plan=plan), paper=paper))
    full = run_simulated(run(setting(*models(), plan=replace(plan, early_majority=False))))
    outcomes = [result.outcome for panel in panels for result in panel.results]
    assert outcomes.count("cancelled") > 0
    for early, late in zip(panels, full, strict=True):
        assert early.complete
        answers = [result.answer for result in late.results if result.answer is not None]
        counts = {answer: answers.count(answer) for answer in answers}
        if early.decided:
            assert early.votes.leader == max(counts, key=counts.__getitem__)
    for cut in range(0, len(paper.records) + 1, 25):
        again = Paper(paper.records[:cut])
        panels = run_simulated(run(setting(*models(), plan=plan), paper=again, done=list(again.records)))
        assert all(panel.complete for panel in panels)
        assert sum(record.key.stage == "end" for record in again.records) == 16 * len(QUESTIONS)


def test_a_deadline_ends_a_chain() -> None:
    plan = replace(PLAN, chain_seconds=2.5)
    slow = [Delayed(HashModel(n, answers=0), Latency(1.0)) for n in ("draft", "target")]
    paper = Paper()
    panels = run_simulated(run(setting(*slow, plan=plan), paper=paper))
    assert {result.outcome for panel in panels for result in panel.results} <= {"deadline", "eos"}
    assert max(r.timing.ended for r in paper.records if r.timing is not None) <= 2.5 + 1e-9


def test_a_stopped_session_begins_nothing_more() -> None:
    paper = Paper()
    models = [HashModel(n) for n in ("draft", "target")]

    async def interrupted() -> list[Panel]:
        made = setting(*models)
        session = Session(made, paper)  # type: ignore[arg-type]

        def stop(record: Record) -> None:
            session.stopping = len(paper.records) >= 12

        made.on_record = stop
        panels = [Panel(question, i, range(4)) for i, question in enumerate(QUESTIONS)]
        await run_async(session, panels)
        return panels

    panels = asyncio.run(interrupted())
    assert not all(panel.complete for panel in panels)
    asyncio.run(run(setting(*models), paper=paper, done=list(paper.records)))
    assert transcript(paper.records) == reference()


def test_ranks_need_all_chains_of_a_turn() -> None:
    paper = Paper()
    asyncio.run(run(setting(HashModel("draft"), HashModel("target"), RankPolicy(2)), run_sync, paper))
    judged = [r for r in paper.records if r.key.stage == "score"]
    for _, group in itertools.groupby(judged, key=lambda r: (r.key.question, r.key.turn)):
        together = list(group)
        taken = [r.score for r in together if r.decision is not None and r.decision.action != "accept"]
        kept = [r.score for r in together if r.decision is not None and r.decision.action == "accept"]
        assert len(taken) == min(2, len(together))
        if kept:
            assert min(taken) >= max(kept)  # type: ignore[type-var]
    for cut in range(len(paper.records) + 1):
        again = Paper(paper.records[:cut])
        made = setting(HashModel("draft"), HashModel("target"), RankPolicy(2))
        asyncio.run(run(made, run_sync, again, list(again.records)))
        assert transcript(again.records) == transcript(paper.records)


def test_limits_force_acceptance_or_wait() -> None:
    paper = Paper()
    made = setting(HashModel("draft"), HashModel("target"), Threshold(cut=0.0), limit=TakeoverLimit(per_question=3))
    asyncio.run(run(made, paper=paper))
    for question in QUESTIONS:
        mine = [r.decision for r in paper.records if r.key.question == question.id and r.decision is not None]
        assert sum(d.action == "continue" for d in mine) == 3
        assert sum(d.reason == "forced" for d in mine) > 0
    paper = Paper()
    delayed = [Delayed(HashModel(n), Latency(0.001)) for n in ("draft", "target")]
    made = setting(*delayed, Threshold(cut=0.0), limit=TakeoverLimit(per_minute=6))
    run_simulated(run(made, paper=paper))
    starts = sorted(r.timing.started for r in paper.records if r.key.stage == "target" and r.timing is not None)
    assert len(starts) > 12
    assert all(later - earlier > 59.9 for earlier, later in zip(starts, starts[12:], strict=False))


# Spec 16, T13


class Clockwork(HashModel):
    """Never answers, never ends; its target is called every time."""

    def __init__(self, name: str) -> None:
        super().__init__(name, answers=0)

    async def generate(self, request: Any) -> Any:
        text = await super().generate(request)
        return replace(text, finish="stop")


def simulated(
    engine: Any, plan: Plan, cv: float, chains: int, name: str = "", share: float = 0.0
) -> tuple[float, Paper]:
    paper = Paper()
    draft = Delayed(Clockwork("draft" + name), Latency(5.0, cv))
    target = Delayed(Clockwork("target" + name), Latency(12.0, cv), Latency(0.3, cv))
    policy = Threshold(cut=share)
    run_simulated(run(setting(draft, target, policy, replace(plan, chains=chains)), engine, paper, (), QUESTIONS[:1]))
    return max(r.timing.ended for r in paper.records if r.timing is not None), paper


def test_without_variance_nobody_waits() -> None:
    plan = Plan(turns=15, draft=Sampling(40), pools=Pools(16, 16, 16))
    for engine in (run_async, run_sync):
        seconds, _ = simulated(engine, plan, 0.0, 16, share=1e9)
        assert seconds == pytest.approx(15 * 5.3)


def test_with_slots_for_all_async_is_never_slower() -> None:
    plan = Plan(turns=6, draft=Sampling(40), pools=Pools(64, 64, 64))
    for i in range(20):
        fast, _ = simulated(run_async, plan, 1.0, 8, str(i), share=1.0)
        slow, _ = simulated(run_sync, plan, 1.0, 8, str(i), share=1.0)
        assert fast <= slow + 1e-6


def test_with_few_slots_async_is_hardly_ever_slower_and_work_is_a_bound() -> None:
    plan = Plan(turns=6, draft=Sampling(40), pools=Pools(3, 2, 2))
    wins = 0
    for i in range(100):
        fast, paper = simulated(run_async, plan, 0.8, 6, str(i), share=1.0)
        slow, _ = simulated(run_sync, plan, 0.8, 6, str(i), share=1.0)
        wins += fast <= slow + 1e-6
        for stage, slots in (("draft", 3), ("score", 2), ("target", 2)):
            times = [r.timing for r in paper.records if r.key.stage == stage and r.timing is not None]
            assert fast >= sum(t.ended - t.started for t in times) / slots - 1e-6
            assert len({t.slot for t in times}) <= slots
    assert wins >= 99


def test_the_clock_stands_where_nothing_sleeps() -> None:
    async def stuck() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="virtual clock"):
        run_simulated(stuck())


def test_deepest_chains_go_first() -> None:
    turns: dict[str, list[int]] = {}
    for order in ("fifo", "deepest"):
        paper = Paper()
        plan = Plan(turns=4, chains=6, draft=Sampling(40), pools=Pools(1, 1, 1, 6, order))  # type: ignore[arg-type]
        delayed = [Delayed(Clockwork(n), Latency(1.0)) for n in ("draft", "target")]
        run_simulated(run(setting(*delayed, Threshold(cut=1e9), plan), paper=paper, questions=QUESTIONS[:1]))
        drafts = sorted((r for r in paper.records if r.key.stage == "draft"), key=lambda r: r.timing.started)  # type: ignore[union-attr]
        turns[order] = [r.key.turn for r in drafts]
    assert turns["fifo"] == sorted(turns["fifo"])
    assert turns["deepest"] != turns["fifo"]


def test_a_cap_holds_over_interruptions_and_for_every_run_alone() -> None:
    made = setting(HashModel("draft"), HashModel("target"), Threshold(cut=0.0), limit=TakeoverLimit(per_question=3))
    whole = Paper()
    asyncio.run(run(made, paper=whole))
    for cut in (10, 30, 60):
        paper = Paper(whole.records[:cut])
        asyncio.run(run(made, paper=paper, done=list(paper.records)))  # the very same object
        for question in QUESTIONS:
            mine = [r.decision for r in paper.records if r.key.question == question.id and r.decision is not None]
            assert sum(d.action == "continue" for d in mine) == 3
