"""Runs drawn at random: policies, what becomes of chunks, limits, faults and ends. Whatever they are, accounts are
exact, nothing is done twice and every chain ends; and where no clock decides, all drivers give the same transcripts."""

import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyquiet.scaling import (
    ATTS,
    AcceptAll,
    Adaptive,
    Bank,
    ConformalPolicy,
    DriftMonitor,
    Hierarchical,
    JudgeGrade,
    MeanNLL,
    OfficialPolicy,
    Online,
    PerQuestion,
    PerTurn,
    Plan,
    Pooled,
    Pools,
    Question,
    RankPolicy,
    Report,
    Retry,
    Rule,
    Sampling,
    SpecReasonPolicy,
    TakeoverLimit,
    read_journal,
)
from pyquiet.scaling.backends.base import ContextOverflowError, GoneError, RefusedError
from pyquiet.scaling.records import TAKEOVERS, Record
from pyquiet.scaling.simulation import run_simulated

from .fake_models import Faulty, HashModel
from .test_accounts import check

ASKED = [
    *(Question(f"q{i}", f"Asked {i}?") for i in range(3)),
    Question("again", "Asked 0?"),
    Question("g", "?", "", "g"),
]
SCORES = Bank(np.linspace(0.5, 1.5, 19))
CLUSTERS = Bank(np.linspace(0.5, 1.5, 12), tuple("abcdefabcdef"))
POLICIES: list[Callable[[], Any]] = [
    lambda: RankPolicy(1), AcceptAll, lambda: AcceptAll(scored=True), lambda: SpecReasonPolicy(4.0),
    lambda: OfficialPolicy(SCORES), lambda: ConformalPolicy(Online(SCORES, update="epoch", batch=2), Rule()),
]  # fmt: skip
CALIBRATORS: list[Callable[[], Any]] = [
    PerQuestion, lambda: Pooled(SCORES, n_min=50), lambda: Hierarchical(CLUSTERS),
    lambda: PerTurn({0: SCORES, 1: SCORES}, base="pooled"), lambda: Online(SCORES, update="epoch", batch=2),
    lambda: Online(update="epoch", batch=2, n_min=6),
]  # fmt: skip
BY_THE_CLOCK: list[Callable[[], Any]] = [
    lambda: Adaptive(PerQuestion()), lambda: Online(SCORES, update="stream"),
    lambda: Online(SCORES, update="window", window=8),
]  # fmt: skip
ORDERS: list[Any] = ["fifo", "oldest", "deepest"]
ENDINGS: list[dict[str, Any]] = [{"early_majority": True}, {"chain_seconds": 0.02}]


class CrashError(Exception):
    """Of who listens to a run."""


class Model(Faulty):
    """Overflows behind `context` tokens, besides."""

    context = 10**6

    async def generate(self, request: Any) -> Any:
        text = await super().generate(request)
        if len(request.prompt.ids) + request.max_tokens > self.context:
            raise ContextOverflowError("long")
        return text


class World:
    """What is drawn by a seed: `timeless` where nothing depends on the clock."""

    def __init__(self, seed: int) -> None:
        dice = self.dice = random.Random(seed)
        self.timeless, self.context = True, dice.choice([10**6, 70])
        self.plan = Plan(
            dice.choice([2, 3]), 3, Sampling(40), Sampling(40), chain_tokens=dice.choice([None, None, 25]),
            answer_from_rejected=dice.random() < 0.5, closing_cue=dice.choice([None, "So: "]), seed=seed,
            pools=Pools(dice.choice([1, 8]), dice.choice([1, 8]), 2, dice.choice([1, 16]), dice.choice(ORDERS)),
        )  # fmt: skip
        self._policy, self._calibrator = dice.choice(POLICIES), dice.choice(CALIBRATORS)
        self._own, self._limit = dice.random() < 0.4, dice.random() < 0.2
        ranks = self._own and isinstance(self._policy(), RankPolicy)
        self._options: dict[str, Any] = {"score": MeanNLL(min_tokens=dice.choice([1, 4]))}
        if self._own:
            judged = isinstance(self._policy(), SpecReasonPolicy)
            self._options |= {"score": JudgeGrade()} if judged else {}
        else:
            self._draw_promise(dice)
        if not self._own and dice.random() < 0.2:
            self._calibrator, self.timeless = dice.choice(BY_THE_CLOCK), False
        elif not self._own and dice.random() < 0.4:
            self._options["drift"] = DriftMonitor(0.9)
        elif not ranks and dice.random() < 0.2:
            self.plan, self.timeless = replace(self.plan, **dice.choice(ENDINGS)), False
        self.timeless &= not self._limit
        alone_only = self.plan.early_majority or self.plan.chain_seconds is not None
        self.engines: list[Any] = ["sync"] if ranks else ["async"] if alone_only else ["async", "sync"]
        self.engine = dice.choice(self.engines)

    def _draw_promise(self, dice: random.Random) -> None:
        self._options |= {
            "tail": dice.choice(["budget", "coverage", "smoothed"]), "discard_rate": dice.choice([0.0, 0.2]),
            "on_takeover": dice.choice(["continue", "replace", "resample"]), "resamples": dice.choice([1, 2]),
            "on_cold": dice.choice(["takeover", "accept", "presample"]),
            "on_score_failure": dice.choice(["takeover", "accept", "fail"]),
        }  # fmt: skip

    def models(self, rng: int, *, faults: float = 0.05) -> list[HashModel]:
        made = [Model(name, latency=1e-3, rng=rng, faults=faults) for name in ("draft", "target")]
        for model in made:
            model.context = self.context
        return list(made)

    def atts(self, models: list[HashModel], tries: int = 9) -> ATTS:
        decides = {"policy": self._policy()} if self._own else {"calibration": self._calibrator()}
        options = self._options | decides | ({"limit": TakeoverLimit(per_question=2)} if self._limit else {})
        return ATTS(*models, plan=self.plan, retry=Retry(tries, base=1e-4), **options)


def transcript(path: Path) -> list[Record]:
    kept = (replace(r, timing=None) for r in read_journal(path)[1] if r.key.stage != "lost")
    return sorted(kept, key=lambda record: record.key)


def broken_off(world: World, journal: Path, models: list[HashModel]) -> None:
    """A run that ends by a crash of who listens, or by an error that cannot be recovered from, or well after all."""
    at, on_record, seen = world.dice.randint(1, 50), None, Counter[str]()
    if world.dice.random() < 0.5:

        def crash(record: Record) -> None:
            seen["all"] += 1
            if seen["all"] == filed + at:
                raise CrashError

        filed, on_record = len(read_journal(journal)[1]) if journal.exists() else 0, crash
    else:
        model: Any = world.dice.choice(models)
        model.at, model.error = at, world.dice.choice([RefusedError("no"), GoneError("away")])
    with suppress(CrashError, RefusedError, GoneError):
        world.atts(models).run(ASKED, journal=journal, engine=world.engine, on_record=on_record)


@pytest.mark.filterwarnings("ignore:(takeover_rate|drift|scores of turn)")
@pytest.mark.parametrize("seed", range(24))
def test_a_run_is_the_same_whoever_drives_it_and_however_often_it_breaks_off(seed: int, tmp_path: Path) -> None:
    world, whole = World(seed), tmp_path / "whole.jsonl"
    models = world.models(1)
    result = world.atts(models).run(ASKED, journal=whole, engine=world.engine)
    check(whole, models)
    ends = Counter((r.key.question, r.key.chain) for r in read_journal(whole)[1] if r.key.stage == "end")
    runs = {(question.id, number) for question in ASKED for number in range(world.plan.chains)}
    assert runs <= set(ends)
    assert set(ends.values()) == {1}
    if world.timeless:
        for other in world.engines:
            virtual = tmp_path / f"{other}.jsonl"
            again = run_simulated(world.atts(world.models(2)).arun(ASKED, journal=virtual, engine=other))
            assert (again.questions, transcript(virtual)) == (result.questions, transcript(whole))
    part, asked = tmp_path / "part.jsonl", [world.models(i) for i in range(3)]
    for i in (0, 1):
        broken_off(world, part, asked[i])
        check(part, *asked[: i + 1])
    last = world.atts(asked[2]).run(ASKED, journal=part, engine=world.engine)
    check(part, *asked)
    assert (last.finished, Report.of(*read_journal(part))) == (True, last.report)
    if world.timeless:
        assert (last.questions, transcript(part)) == (result.questions, transcript(whole))
    taken = Counter(r.key.question for r in read_journal(part)[1] if r.decision and r.decision.action in TAKEOVERS)
    assert not world._limit or max(taken.values(), default=0) <= 2


@pytest.mark.filterwarnings("ignore:(takeover_rate|drift|scores of turn)")
@pytest.mark.parametrize("seed", range(100, 108))
def test_requests_that_are_given_up_are_counted_and_not_sent_again(seed: int, tmp_path: Path) -> None:
    world, journal = World(seed), tmp_path / "run.jsonl"
    models = world.models(3, faults=0.4)
    result = world.atts(models, tries=2).run(ASKED, journal=journal, engine=world.engine)
    assert check(journal, models)
    again = world.models(4)
    second = world.atts(again, tries=2).run(ASKED, journal=journal, engine=world.engine)
    assert not any(model.requests for model in again)
    assert (second.report, second.questions) == (result.report, result.questions)
