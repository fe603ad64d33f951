"""ATTS as users call it: calibration, promises, journals, selection, interruption."""

import asyncio
import math
import os
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Callable
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
    Budget,
    ConformalPolicy,
    DriftMonitor,
    Hierarchical,
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
    RSDPolicy,
    Rule,
    Sampling,
    SpecReasonPolicy,
    TakeoverLimit,
    as_questions,
    load_calibrator,
    read_journal,
    read_questions,
    votes,
)
from pyquiet.scaling.backends.base import TransientError
from pyquiet.scaling.backends.connect import connect
from pyquiet.scaling.cells import Cell
from pyquiet.scaling.cold import ColdStart
from pyquiet.scaling.records import Record
from pyquiet.scaling.simulation import Delayed, Latency, run_simulated
from pyquiet.zoo import folder, load

from .fake_models import HashModel

PLAN = Plan(chains=4, turns=3, draft=Sampling(40), target=Sampling(40), pools=Pools(8, 8, 8, 16))
CAPPED = replace(PLAN, chain_tokens=60)
BANK = [Question(f"b{i}", f"Bank {i}?") for i in range(30)]
ASKED = [Question(f"q{i}", f"Asked {i}?", answer="2") for i in range(6)]


def atts(plan: Plan = PLAN, **options: Any) -> ATTS:
    options.setdefault("score", MeanNLL(min_tokens=1))
    draft, target = options.pop("models", None) or [HashModel(name) for name in ("draft", "target")]
    return ATTS(draft, target, plan=plan, **options)


def transcript(path: Path) -> list[Record]:
    kept = (replace(r, timing=None) for r in read_journal(path)[1] if r.key.stage != "lost")
    return sorted(kept, key=lambda record: record.key)


def test_without_a_calibration_every_question_has_its_own_bank() -> None:
    result = atts().run(ASKED)
    assert [r.question for r in result.questions] == ASKED
    assert all(len(r.chains) == 4 for r in result.questions)
    assert result.finished
    assert result.guaranteed[0] == (True, "first turn, ranked among the question's own first chunks")
    assert result.guaranteed[1] == (False, "the bank holds first chunks only")
    assert result.report.turns[0].promised == pytest.approx(2 / 5)
    assert result.report.turns[0].band is not None
    assert result.answers.keys() == {q.id for q in ASKED}


@pytest.mark.parametrize("kind", ["pooled", "hierarchical", "per_turn"])
def test_calibration_is_saved_and_serves_another(kind: Any, tmp_path: Path) -> None:
    first = atts()
    made = first.calibrate(BANK, kind=kind)
    assert isinstance(made, {"pooled": Pooled, "hierarchical": Hierarchical, "per_turn": PerTurn}[kind])
    first.save_calibration(tmp_path / "bank")
    wanted, got = first.run(ASKED), atts(calibration=tmp_path / "bank").run(ASKED)
    assert got.questions == wanted.questions
    assert got.guaranteed[0][0] == (kind != "pooled")
    assert got.guaranteed[1][0] == (kind == "per_turn")
    with pytest.raises(ValueError, match=r"target=.*calibrate again"):
        atts(calibration=tmp_path / "bank", models=[HashModel("draft"), HashModel("other")]).run(ASKED)
    others: list[dict[str, Any]] = [{"takeover_rate": 0.3}, {"on_takeover": "replace"}, {"plan": CAPPED}]
    for options in others:  # first chunks are the same for all rules, later ones are not
        other = atts(calibration=tmp_path / "bank", **options)
        if kind == "per_turn":
            with pytest.raises(ValueError, match=r"(rule|chains)=.*calibrate again"):
                other.run(ASKED)
        else:
            assert other.run(ASKED).guaranteed[0] == got.guaranteed[0]


def test_a_calibrator_is_used_under_the_settings_that_made_it_alone(tmp_path: Path) -> None:
    def nothing(text: str) -> None: ...

    first, turns = atts(), PLAN.turns
    made = first.calibrate(BANK, chains=1, turns=turns)
    first.save_calibration(tmp_path)
    rule, cue = Rule(0.4), replace(PLAN, closing_cue="So")
    others: list[tuple[str, dict[str, Any]]] = [
        ("rule", {"takeover_rate": 0.3}),
        ("rule", {"on_takeover": "replace"}),
        ("target", {"models": [HashModel("draft"), HashModel("other")]}),
        ("chain_seconds", {"plan": replace(PLAN, chain_seconds=60.0)}),
        ("extract", {"extract": nothing}),
        ("on_score_failure", {"on_score_failure": "accept"}),
        ("chains", {"plan": cue}),
    ]
    for name, options in others:
        for calibration in (made, load_calibrator(tmp_path)):
            with pytest.raises(ValueError, match=rf"{name}=.*calibrate again"):
                atts(calibration=calibration, **options).run(ASKED)
    with pytest.raises(ValueError, match=r"rule=.*calibrate again"):
        atts(policy=ConformalPolicy(made, replace(rule, tail="smoothed"))).run(ASKED)
    for fitting in (atts(calibration=made), atts(policy=ConformalPolicy(made, rule))):
        assert fitting.run(ASKED).guaranteed[0][0]
    cued = atts(cue)
    cued.calibrate(BANK, chains=1)
    with pytest.raises(ValueError, match="closing_turn='3'"):  # the cue stands before the last turn
        atts(replace(cue, turns=4), calibration=cued.calibrator).run(ASKED)


def test_what_first_chunks_do_not_depend_on_may_change(tmp_path: Path) -> None:
    first = atts()
    made = first.calibrate(BANK, kind="hierarchical", chains=1)
    assert atts(calibration=made, takeover_rate=0.1).run(ASKED).guaranteed[0][0]
    other = [HashModel("draft"), HashModel("other")]
    with pytest.raises(ValueError, match=r"target=.*calibrate again"):
        atts(calibration=Adaptive(made), models=other).run(ASKED)
    own = PerQuestion()
    atts(calibration=own).run(ASKED)
    with pytest.raises(ValueError, match=r"target=.*calibrate again"):
        atts(calibration=own, models=other).run(ASKED)


def test_calibration_chains_of_a_turn_calibrate_no_other(tmp_path: Path) -> None:
    journal = tmp_path / "calibration.jsonl"
    first = atts()
    made = first.calibrate(BANK, chains=2, journal=journal)
    assert isinstance(made, PerTurn)
    records = [r for r in read_journal(journal)[1] if r.decision is not None and r.decision.reason == "calibration"]
    turns: dict[tuple[str, int], set[int]] = {}
    for record in records:
        turns.setdefault((record.key.question, record.key.chain), set()).add(record.key.turn)
    assert all(len(seen) == 1 for seen in turns.values())
    assert made.banks[0].size == 20
    assert 0 < made.banks[1].size < 20  # some chains have ended
    groups = [set(bank.groups) for bank in made.banks.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))
    again = atts()
    again.calibrate(BANK, chains=2, journal=journal)
    assert again.calibrator is not None
    assert again.calibrator.version == made.version


def test_what_calibration_took_is_counted_in_every_report(tmp_path: Path) -> None:
    journal, bank = tmp_path / "run.jsonl", tmp_path / "bank.jsonl"
    runner = atts(models=[HashModel(name, latency=1e-3) for name in ("draft", "target")])
    runner.calibrate(BANK, kind="hierarchical", chains=1, journal=bank)
    report = runner.run(ASKED, journal=journal).report
    assert report == Report.of(*read_journal(journal), calibration=read_journal(bank)[1])
    assert report.calibration > 0
    assert report.calibration_cost["draft"].requests == len(BANK)
    again = atts()
    again.calibrate(BANK, kind="hierarchical", chains=1, journal=bank)  # nothing is asked anew, and yet it took that
    assert again.run(ASKED, journal=journal).report == report
    runner.calibrate(BANK[:9], kind="hierarchical", chains=1)
    assert runner.run(ASKED).report.calibration_cost["draft"].requests == 9


def test_a_calibration_that_goes_on_counts_no_second_twice(tmp_path: Path) -> None:
    def calibrate(journal: Path) -> float:
        runner = atts(models=[Delayed(HashModel(name), Latency(1.0)) for name in ("draft", "target")])
        run_simulated(runner.acalibrate(BANK, chains=1, journal=journal))
        return runner.run(ASKED[:1]).report.calibration

    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    wanted, lines = calibrate(whole), whole.read_bytes().splitlines(keepends=True)
    third = next(i for i, line in enumerate(lines) if b'"chain":2' in line)  # of three parts, each with its own clock
    part.write_bytes(b"".join(lines[: third + 1]))
    assert wanted > 12
    assert wanted <= calibrate(part) <= wanted + 1  # the request that was on its way is sent again


def test_what_a_saved_bank_took_is_told_apart_where_it_serves_again(tmp_path: Path) -> None:
    runner = atts(models=[HashModel(name, latency=1e-3) for name in ("draft", "target")])
    made = runner.calibrate(BANK, chains=1)
    runner.save_calibration(tmp_path / "bank")
    own = runner.run(ASKED).report
    assert (own.spent_before, own.calibration > 0) == (None, True)
    report = atts(calibration=tmp_path / "bank").run(ASKED).report
    assert report.spent_before is not None
    assert (report.spent_before.seconds, report.spent_before.cost) == (own.calibration, own.calibration_cost)
    assert (report.calibration, report.calibration_cost["draft"].requests) == (0.0, 0)
    words = f"{own.calibration:.1f} s and {report.spent_before.tokens} tokens written had been spent on it"
    assert words in str(report)
    assert report.spent_before.tokens > 100
    assert report.to_dict()["spent_before"]["cost"]["draft"]["requests"] == own.calibration_cost["draft"].requests
    for other in (made, load_calibrator(tmp_path / "bank"), Adaptive(made)):
        again = atts(calibration=other)
        assert again.run(ASKED).report.spent_before == report.spent_before
        again.save_calibration(tmp_path / "again")
        assert load_calibrator(tmp_path / "again").spent == report.spent_before
    assert atts().run(ASKED).report.spent_before is None


def test_turns_may_have_banks_of_their_own(tmp_path: Path) -> None:
    plan = replace(PLAN, turns=5)
    runner = atts(plan, models=[HashModel(name, answers=0.05) for name in ("draft", "target")])
    made = runner.calibrate(BANK, chains=1, turns=3, journal=tmp_path / "calibration.jsonl")
    assert isinstance(made, PerTurn)
    assert (made.buckets, sorted(made.banks)) == ((0, 1, 2, 3), [0, 1, 2])
    assert made.banks[0].size == 10
    guaranteed = runner.run(ASKED).guaranteed
    assert [sure for sure, _ in guaranteed.values()] == [True, True, True, False, False]
    assert guaranteed[4][1] == "too few scores of this turn: ranked among those of turn 2"
    with pytest.raises(ValueError, match='turns goes with kind="per_turn"'):
        runner.calibrate(BANK, kind="pooled", turns=3)
    with pytest.raises(ValueError, match="turns must be at least 1"):
        runner.calibrate(BANK, turns=0)


@pytest.mark.parametrize("kind", ["pooled", "hierarchical", "per_turn"])
def test_questions_are_known_by_their_text_and_group_whatever_their_ids(kind: Any) -> None:
    runner = atts()
    runner.calibrate([f"Bank {i}?" for i in range(30)], kind=kind)
    new = runner.run([f"Asked {i}?" for i in range(6)]).guaranteed[0]
    known = runner.run([Question(f"k{i}", f" Bank  {i}?") for i in range(6)]).guaranteed[0]
    assert (new[0], known[0]) == ((False, True) if kind == "pooled" else (True, False))
    assert "if it is like" in new[1] or "if the question is like" in new[1] or kind == "pooled"
    assert "question is in the bank" in known[1] or kind == "pooled"
    other = runner.run([Question(f"k{i}", f"Bank {i}?", group="law") for i in range(6)]).guaranteed[0]
    assert not other[0]
    assert "'law'" in other[1] or kind == "pooled"


@pytest.mark.parametrize("kind", ["hierarchical", "per_turn"])
def test_a_bank_promises_nothing_of_groups_that_it_does_not_hold(kind: Any) -> None:
    runner = atts()
    runner.calibrate([replace(question, group="math") for question in BANK], kind=kind)
    for group, sure in (("math", True), ("law", False), ("", False)):
        assert runner.run([replace(question, group=group) for question in ASKED]).guaranteed[0][0] == sure


def test_a_question_of_the_same_id_gets_a_bank_of_its_own() -> None:
    filled = PerQuestion()
    atts(calibration=filled).run(["One?", "Two?"])
    atts(calibration=filled).run(["Three?", "Two?"])
    assert len(filled.banks) == 3


@pytest.mark.parametrize(("name", "value"), [("early_majority", True), ("chain_seconds", 60.0)])
def test_nothing_is_promised_where_votes_or_the_clock_end_chains(name: str, value: Any) -> None:
    runner = atts(replace(PLAN, **{name: value}))
    runner.calibrate(BANK, chains=1, turns=3)
    guaranteed = runner.run(ASKED).guaranteed
    assert [sure for sure, _ in guaranteed.values()] == [False, False, False]
    assert all(why.startswith(name) for _, why in guaranteed.values())


def test_the_released_settings_are_a_preset() -> None:
    runner = atts(preset="paper")
    assert (runner.rule.tail, runner.rule.alpha, runner.plan.answer_from_rejected) == ("coverage", 0.6, True)
    assert isinstance(runner.calibrate(BANK, chains=1), Pooled)
    assert isinstance(runner.calibrate(BANK, kind="hierarchical", chains=1), Hierarchical)
    assert atts(preset="paper", tail="budget").rule.tail == "budget"
    assert atts().rule.tail == "budget"
    with pytest.raises(ValueError, match='preset must be "paper"'):
        atts(preset="ours")


def test_banks_of_questions_that_are_known_are_not_filled_again(tmp_path: Path) -> None:
    first = atts(calibration=PerQuestion())
    wanted = first.run(ASKED)
    first.save_calibration(tmp_path / "bank")
    models, journal = [HashModel(name) for name in ("draft", "target")], tmp_path / "run.jsonl"
    again = atts(models=models, calibration=tmp_path / "bank").run([*ASKED, "another one?"], journal=journal)
    assert again.questions[: len(ASKED)] == wanted.questions
    presampled = {r.key.question for r in read_journal(journal)[1] if r.key.phase == "presample"}
    assert presampled == {"6"}


@pytest.mark.parametrize(
    ("what", "outcomes", "stages"),
    [
        ("takeover", {"answer", "eos", "turns"}, {"draft", "score", "target"}),
        ("accept", {"answer", "eos", "turns"}, {"draft", "score"}),
        ("fail", {"failed"}, {"draft"}),
    ],
)
def test_what_becomes_of_chunks_that_cannot_be_scored(
    what: Any, outcomes: set[str], stages: set[str], tmp_path: Path
) -> None:
    class Blind(HashModel):
        async def score(self, request: Any) -> Any:
            raise TransientError("no log-probabilities today")

    models = [HashModel("draft"), Blind("target")]
    runner = atts(models=models, on_score_failure=what, calibration=Pooled(Bank(np.arange(9.0))), retry=Retry(1))
    result = runner.run(ASKED, journal=tmp_path / "run.jsonl")
    assert {chain.outcome for question in result.questions for chain in question.chains} <= outcomes
    assert {r.key.stage for r in read_journal(tmp_path / "run.jsonl")[1]} == {*stages, "lost", "end"}
    with pytest.raises(ValueError, match="on_score_failure must be"):
        atts(on_score_failure="wait")


class Sinking(HashModel):
    """Likes what stands later in a text less, so that scores differ from turn to turn."""

    async def score(self, request: Any) -> Any:
        scored = await super().score(request)
        return replace(scored, log_probs=tuple(x - request.start / 10 for x in scored.log_probs))


def rates(rate: float, banks: int = 8, **calibrate: Any) -> list[float]:
    """How often the target takes over at each turn, of ATTS that is asked for `rate`, 300 questions for each bank."""
    plan, counts = replace(PLAN, chains=1), [[0, 0] for _ in range(PLAN.turns)]

    def count(record: Record) -> None:
        if record.decision is not None and record.key.phase == "run" and record.decision.p is not None:
            counts[record.key.turn][0] += record.decision.action != "accept"
            counts[record.key.turn][1] += 1

    for seed in range(banks):
        models = [HashModel("draft", answers=0.05), Sinking("target", answers=0.05)]
        runner = atts(replace(plan, seed=seed), models=models, takeover_rate=rate, tail="smoothed")
        bank = runner.calibrate([f"{seed} bank {i:03}?" for i in range(420)], chains=1, **calibrate)
        assert min(getattr(bank, "sizes", ())) >= 100
        runner.run([f"{seed} test {i:03}?" for i in range(300)], on_record=count)
    assert min(decided for _, decided in counts) >= 1500 * banks / 8
    return [taken / decided for taken, decided in counts]


# Four standard deviations of 8 banks of 100 scores or more and 1,500 decisions or more.
SPREAD = 4 * (0.3 * 0.7 * (1 / (8 * 100) + 1 / 1500)) ** 0.5


def test_the_promised_rate_is_kept_at_every_calibrated_turn_and_no_other_is() -> None:
    assert SPREAD < 0.085
    assert all(abs(rate - 0.3) < SPREAD for rate in rates(0.3, turns=3))
    assert all(abs(rate - 0.3) > SPREAD for rate in rates(0.45, 3, turns=3))  # else the line above could not fail


def test_a_bank_of_first_chunks_does_not_keep_the_rate_at_later_turns() -> None:
    first, *later = rates(0.3, kind="pooled")
    assert abs(first - 0.3) < SPREAD
    assert all(abs(rate - 0.3) > 2 * SPREAD for rate in later)


def test_a_journal_resumes_and_refuses_another_run(tmp_path: Path) -> None:
    journal, other = tmp_path / "run.jsonl", tmp_path / "half.jsonl"
    whole = atts().run(ASKED, journal=journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    other.write_bytes(b"".join(lines[: len(lines) // 2]) + b'{"torn')
    models = [HashModel(name) for name in ("draft", "target")]
    seen: list[Record] = []
    again = atts(models=models).run(ASKED, journal=other, on_record=seen.append)
    assert again.questions == whole.questions
    assert again.guaranteed == whole.guaranteed
    assert transcript(other) == transcript(journal)
    assert len(seen) == len(read_journal(journal)[1])
    asked = sum(r.timing is not None for r in read_journal(journal)[1])
    assert 0 < sum(len(model.requests) for model in models) < asked
    with pytest.raises(ValueError, match="seed"):
        atts(replace(PLAN, seed=1)).run(ASKED, journal=journal)
    with pytest.raises(ValueError, match="questions"):
        atts().run(ASKED[:2], journal=journal)


BANK_OF_9 = Bank(np.arange(9.0), tuple("abcdefghi"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"policy": RankPolicy(1)}, {"policy": RankPolicy(2)}),
        ({"policy": RankPolicy(1)}, {"policy": RankPolicy(1, on_takeover="replace")}),
        ({"policy": AcceptAll()}, {"policy": AcceptAll(scored=True)}),
        ({"policy": OfficialPolicy(BANK_OF_9)}, {"policy": OfficialPolicy(BANK_OF_9, threshold=0.5)}),
        ({"policy": OfficialPolicy(BANK_OF_9)}, {"policy": OfficialPolicy(BANK_OF_9.add([1.0]))}),
        ({"policy": SpecReasonPolicy()}, {"policy": SpecReasonPolicy(6.0)}),
        ({"policy": RSDPolicy()}, {"policy": RSDPolicy(soft=True)}),
        (
            {"policy": ConformalPolicy(Pooled(BANK_OF_9), Rule(0.4))},
            {"policy": ConformalPolicy(Pooled(BANK_OF_9), Rule(0.4, "coverage"))},
        ),
        (
            {"policy": ConformalPolicy(Pooled(BANK_OF_9), Rule(0.4))},
            {"policy": ConformalPolicy(Pooled(BANK_OF_9), Rule(0.4), resamples=1)},
        ),
        ({"calibration": Pooled(BANK_OF_9)}, {"calibration": Hierarchical(BANK_OF_9)}),
        ({"calibration": Pooled(BANK_OF_9)}, {"calibration": Pooled(BANK_OF_9, n_min=3)}),
        ({}, {"limit": TakeoverLimit(per_question=1)}),
        ({"limit": TakeoverLimit(per_question=1)}, {"limit": TakeoverLimit(per_question=2)}),
        ({}, {"extract": str.strip}),
    ],
)
def test_a_journal_refuses_another_policy_limit_or_extractor(
    one: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    def run(options: dict[str, Any]) -> Any:
        return atts(**options).run(ASKED[:1], journal=tmp_path / "run.jsonl", engine="sync")

    assert run(one).finished
    assert run(one).finished
    with pytest.raises(ValueError, match=next(iter(other)).replace("calibration", "calibrator")):
        run(other)


def test_a_calibration_that_was_interrupted_fills_the_same_bank(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    wanted = atts().calibrate(BANK, chains=1, journal=whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    asked = sum(r.timing is not None for r in read_journal(whole)[1])
    for kept in range(1, len(lines), len(lines) // 8):
        part.write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
        spared = sum(r.timing is not None for r in read_journal(part)[1])
        models = [HashModel(name) for name in ("draft", "target")]
        assert atts(models=models).calibrate(BANK, chains=1, journal=part).version == wanted.version
        assert sum(len(model.requests) for model in models) == asked - spared


def test_both_engines_and_a_running_loop_give_the_same() -> None:
    wanted = atts().run(ASKED)
    assert atts().run(ASKED, engine="sync").questions == wanted.questions

    async def notebook() -> Any:
        return atts().run(ASKED)

    assert asyncio.run(notebook()).questions == wanted.questions


def test_other_policies_and_selections(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"RankPolicy compares.*sync"):
        atts(policy=RankPolicy(1)).run(ASKED)
    ranked = atts(policy=RankPolicy(1)).run(ASKED, engine="sync")
    assert not ranked.guaranteed[0][0]
    target = HashModel("target")
    draft_alone = atts(models=[HashModel("draft"), target], policy=AcceptAll(), select="first")
    alone = draft_alone.run(ASKED, journal=tmp_path / "run.jsonl")
    assert {r.key.stage for r in read_journal(tmp_path / "run.jsonl")[1]} == {"draft", "score", "end"}
    assert not target.requests
    assert alone.report.cost["score"].requests == 0
    atts(models=[HashModel("draft"), target], policy=AcceptAll(scored=True), select="weighted").run(ASKED)
    assert set(target.requests) == {"score"}
    with pytest.raises(ValueError, match=r"AcceptAll\(scored=True\)"):
        atts(policy=AcceptAll(), select="weighted")
    assert alone.answers["q0"] in {chain.answer for chain in alone.questions[0].chains}


class Interrupting(HashModel):
    """Presses Ctrl-C at its 20th request."""

    async def generate(self, request: Any) -> Any:
        if len(self.requests) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return await super().generate(request)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_an_interruption_ends_well_and_resumes(tmp_path: Path) -> None:
    journal = tmp_path / "run.jsonl"
    models = [Interrupting("draft", latency=1e-3), HashModel("target", latency=1e-3)]
    half = atts(models=models).run(ASKED, journal=journal)
    assert not half.finished
    assert len(half.questions) < len(ASKED)
    whole = atts().run(ASKED, journal=journal)
    assert whole.finished
    assert whole.questions == atts().run(ASKED).questions


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"takeover_rate": 1.2}, "takeover_rate must lie between 0 and 1, got 1.2"),
        ({"tail": "both"}, "tail must be"),
        ({"select": "best"}, "select must be"),
        ({"on_takeover": "stop"}, "on_takeover must be"),
        ({"chains": -1}, "chains must be at least 1"),
        ({"chains": 0}, "chains must be at least 1"),
        ({"degrade": "no"}, "degrade must be"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        atts(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drift": 0.01}, "drift must be a DriftMonitor(level), got 0.01"),
        ({"drift": DriftMonitor}, "drift must be a DriftMonitor(level), got <class"),
        ({"calibration": 5}, "calibration must be a calibrator, such as Pooled(bank), or the folder"),
        ({"calibration": PerQuestion}, "calibration must be a calibrator"),
        ({"limit": 3}, "limit must be a TakeoverLimit(per_question, ...), got 3"),
        ({"policy": "rank"}, "policy must be a policy, such as RankPolicy(4), got 'rank'"),
        ({"score": MeanNLL}, "score must be a score, such as MeanNLL()"),
        ({"plan": {"chains": 3}}, "plan must be a plan, Plan(...), got {'chains': 3}"),
        ({"retry": 6}, "retry must be a Retry(tries, ...), got 6"),
        ({"extract": r"\d+"}, "extract must be a function of a text"),
        ({"template": 1}, "template must be a text with {question}, or a function, got 1"),
        ({"system": 1}, "system must be a text, got 1"),
        ({"discard_rate": "a"}, "discard_rate must be a number, got str 'a'"),
        ({"takeover_rate": None}, "takeover_rate must be a number, got NoneType None"),
    ],
)
def test_what_cannot_serve_is_named_before_any_model_is_asked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        ATTS(HashModel("draft"), HashModel("target"), **options)


def test_a_plan_without_top_k_is_written_as_before_there_was_one() -> None:
    assert Plan().to_dict()["draft"] == {"tokens": 500, "temperature": 0.8, "top_p": 1.0}
    assert Plan(target=Sampling(top_k=5)).to_dict()["target"]["top_k"] == 5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DriftMonitor("a"), "level must be a number, got str 'a'"),  # type: ignore[arg-type]
        (lambda: TakeoverLimit(per_minute="6"), "per_minute must be a number, got str '6'"),  # type: ignore[arg-type]
        (lambda: Adaptive(5), "base must be a calibrator, such as Pooled(bank), got 5"),  # type: ignore[arg-type]
        (lambda: Adaptive(PerQuestion(), step="a"), "step must be a number, got str 'a'"),  # type: ignore[arg-type]
        (lambda: Sampling(temperature="hot"), "temperature must be a number, got str 'hot'"),  # type: ignore[arg-type]
        (lambda: Sampling(top_p=True), "top_p must be a number, got bool True"),
        (lambda: Sampling(top_k=2.0), "top_k must be an int, got float 2.0"),  # type: ignore[arg-type]
        (lambda: Plan(chain_seconds="1"), "chain_seconds must be a number, got str '1'"),  # type: ignore[arg-type]
        (lambda: Plan(draft=5), "draft must be of type Sampling, got 5"),  # type: ignore[arg-type]
        (lambda: Plan(pools=None), "pools must be of type Pools, got None"),  # type: ignore[arg-type]
        (lambda: Plan(seed="a"), "seed must be of type int, got 'a'"),  # type: ignore[arg-type]
        (lambda: Plan(closing_cue=5), "closing_cue must be of type str, got 5"),  # type: ignore[arg-type]
        (lambda: Retry(cap="x"), "retry.cap must be a number, got str 'x'"),  # type: ignore[arg-type]
        (lambda: Budget("4", 16), "takeovers must be an int, got str '4'"),  # type: ignore[arg-type]
        (lambda: Pooled([1.0]), "bank must be a Bank(scores, groups), got [1.0]"),  # type: ignore[arg-type]
        (lambda: PerTurn({0: [1.0]}), "bank must be a Bank(scores, groups), got [1.0]"),  # type: ignore[dict-item]
        (lambda: PerQuestion({"a": [1.0]}), "bank must be a Bank(scores, groups), got [1.0]"),  # type: ignore[dict-item]
        (lambda: Online([1.0]), "bank must be a Bank(scores, groups), got [1.0]"),  # type: ignore[arg-type]
        (lambda: OfficialPolicy([1.0]), "bank must be a Bank(scores, groups), got [1.0]"),  # type: ignore[arg-type]
        (lambda: ConformalPolicy(PerQuestion(), 0.4), "rule must be a Rule(takeover_rate, ...), got 0.4"),  # type: ignore[arg-type]
        (lambda: RSDPolicy("high"), "threshold must be a number, got str 'high'"),  # type: ignore[arg-type]
        (lambda: SpecReasonPolicy(None), "threshold must be a number, got NoneType None"),  # type: ignore[arg-type]
        (lambda: Adaptive(Pooled), "base must be a calibrator"),  # type: ignore[arg-type]
        (lambda: as_questions([Question("a", None)]), "questions[0].text must be a text, got None"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_number_is_named(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Plan(stop=("a", 1)), "stop must be a tuple of strings"),  # type: ignore[arg-type]
        (lambda: Plan(stop=None), "stop must be a tuple of strings"),  # type: ignore[arg-type]
        (lambda: Retry(base=-1), "retry.base must be at least 0 seconds, got -1"),
        (lambda: Retry(deadline=math.nan), "retry.deadline must be at least 0 seconds, got nan"),
        (lambda: Budget(4, 0), "chains must be at least 1, got 0"),
        (lambda: Hierarchical(Bank(np.arange(3.0)), chains=0), "chains must be at least 1, got 0"),
        (lambda: PerTurn({}, base="pool"), "base must be one of pooled, hierarchical, got 'pool'"),  # type: ignore[arg-type]
    ],
)
def test_numbers_and_texts_that_make_no_sense_are_named(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def test_a_rate_of_numpy_is_a_rate(tmp_path: Path) -> None:
    atts(takeover_rate=np.float32(0.5)).run(ASKED, journal=tmp_path / "run.jsonl")
    assert read_journal(tmp_path / "run.jsonl")[0]["config"]["takeover_rate"] == 0.5


BIG = Pooled(Bank(np.arange(19.0)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"policy": RankPolicy(1), "drift": DriftMonitor()}, "drift does nothing beside policy"),
        ({"policy": ConformalPolicy(BIG, Rule()), "drift": DriftMonitor()}, "drift does nothing beside policy"),
        ({"policy": RankPolicy(1), "calibration": BIG}, "calibration does nothing beside policy"),
        ({"calibration": Adaptive(BIG), "drift": DriftMonitor()}, "drift has nothing to watch with Adaptive"),
        ({"calibration": PerQuestion(n_min=5)}, "n_min must be at most chains, 4, since.*got 5"),
        ({"calibration": Adaptive(PerQuestion(n_min=5))}, "n_min must be at most chains, 4, since.*got 5"),
        ({"policy": ConformalPolicy(PerQuestion(n_min=5), Rule())}, "n_min must be at most chains"),
        (
            {
                "policy": ConformalPolicy(BIG, Rule(), drift=DriftMonitor()),
                "plan": replace(PLAN, early_majority=True),
            },
            "drift watches what is promised, and nothing is",
        ),
    ],
)
def test_what_would_do_nothing_beside_another_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        atts(**options)


def test_a_policy_of_ones_own_does_not_watch_what_adapts() -> None:
    for calibrator in (Adaptive(BIG), ColdStart(Adaptive(BIG))):
        with pytest.raises(ValueError, match="drift has nothing to watch with Adaptive"):
            ConformalPolicy(calibrator, Rule(), drift=DriftMonitor())


def test_a_monitor_that_was_shown_nothing_says_so() -> None:
    with pytest.warns(UserWarning, match="drift: Pooled promised nothing here, so no p-value was watched"):
        atts(calibration=BIG, drift=DriftMonitor()).run(ASKED)


@pytest.mark.parametrize(
    ("options", "n"),
    [
        ({}, 4),
        ({"calibration": PerQuestion()}, 4),
        ({"policy": ConformalPolicy(PerQuestion(), Rule(0.15))}, 4),
        ({"calibration": Online(n_min=99), "on_cold": "presample"}, 4),
        ({"calibration": Online(Bank(np.arange(5.0)))}, 5),
        ({"calibration": Pooled(Bank(np.arange(5.0)))}, 5),
        ({"calibration": PerQuestion({Cell.of(q).name: Bank(np.arange(5.0)) for q in ASKED[:1]})}, 5),
    ],
)
def test_a_rate_that_no_bank_can_give_is_warned_of(options: dict[str, Any], n: int) -> None:
    with pytest.warns(UserWarning, match=rf"below 1 / \(n \+ 1\) for a bank of n = {n} scores"):
        atts(takeover_rate=0.15, **options).run(ASKED[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atts(takeover_rate=0.15, calibration=Online(BIG.bank, n_min=9), on_cold="presample").run(ASKED[:1])
        calibrated = atts(takeover_rate=0.15)  # not before it is known which bank will serve
        calibrated.calibrate(BANK[:2], kind="pooled")
        calibrated.run(ASKED[:1])


def test_no_bank_is_filled_that_would_not_serve() -> None:
    runner = atts(policy=AcceptAll())
    with pytest.raises(ValueError, match="policy: AcceptAll decides, and would not use a bank"):
        runner.calibrate(BANK)
    runner.policy = None
    with pytest.raises(ValueError, match="kind must be one of pooled, hierarchical, per_turn, got 'best'"):
        runner.calibrate(BANK, kind="best")  # type: ignore[arg-type]
    assert runner.draft.requests == []


def test_a_rate_adapts_in_banks_that_the_run_fills(tmp_path: Path) -> None:
    bank = Adaptive(PerQuestion(), step=0.1)
    runner = atts(calibration=bank)
    result = runner.run(ASKED, journal=tmp_path / "run.jsonl")
    assert set(result.report.reasons) == {"p"}
    assert bank.seen == result.report.takeovers.decisions
    assert result.guaranteed[0] == (False, "adaptive: the rate is kept in the long run only")
    runner.save_calibration(tmp_path / "bank")
    back = load_calibrator(tmp_path / "bank")
    assert (back.version, back.taxonomy) == (bank.version, bank.taxonomy)
    with pytest.raises(ValueError, match=r"target=.*calibrate again"):
        atts(calibration=bank, models=[HashModel("draft"), HashModel("other")]).run(ASKED)


def test_no_request_waits_while_answers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    models, asked, count = [HashModel("draft"), HashModel("target")], set(), votes.majority

    def majority(ballot: Any) -> str | None:
        asked.add(tuple(len(model.requests) for model in models))
        return count(ballot)

    monkeypatch.setattr(votes, "majority", majority)
    atts(models=models).run(ASKED)
    assert asked == {tuple(len(model.requests) for model in models)}


def test_bad_questions_are_named(tmp_path: Path) -> None:
    runner = atts()
    with pytest.raises(TypeError, match="pass \\[question\\]"):
        runner.run("What?")
    with pytest.raises(ValueError, match="at least one question"):
        runner.run([])
    with pytest.raises(ValueError, match="id '1' comes twice"):
        runner.run([{"id": 1, "question": "a"}, {"id": "1", "question": "b"}])
    with pytest.raises(ValueError, match=r"questions\[1\] has no text"):
        runner.run(["a", {"anser": 3}])
    with pytest.raises(ValueError, match="engine must be one of async, sync"):
        runner.run(["a"], engine="fast")  # type: ignore[arg-type]
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "a", "answer": 7}\n\n{"problem": \n')
    with pytest.raises(ValueError, match="line 3"):
        read_questions(file)
    file.write_text(
        '{"question": "a", "answer": 7}\n\n{"problem": "b", "solution": "so \\\\boxed{8}", "unique_id": "x"}\n'
    )
    assert read_questions(file) == [Question("0", "a", "7"), Question("x", "b", "8")]
    file.write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(ValueError, match=r"questions\.jsonl is not UTF-8"):
        read_questions(file)


def test_what_is_no_model_is_named() -> None:
    with pytest.raises(TypeError, match="draft must be a backend"):
        ATTS(3, HashModel("target"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tuple of 3"):
        ATTS((1, 2, 3), HashModel("target"))  # type: ignore[arg-type]


def test_a_model_that_is_not_here_is_named_without_asking_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("socket.getaddrinfo", ask)
    for name in ("nowhere", "./some", "no/such/folder"):
        with pytest.raises(ValueError, match=f"^draft {name}: no model folder .*hf download {name}"):
            ATTS(name, HashModel("target"))


def test_a_model_of_the_hub_is_fetched_as_transformers_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(name: str) -> Any:
        asked.append(name)
        return load("tiny-draft")

    monkeypatch.setattr("pyquiet.scaling.backends.connect._pretrained", fetch)
    assert ATTS("some/where", HashModel("target")).draft.identity == connect("draft", "tiny-draft").identity
    assert asked == ["some/where"]


def test_a_model_that_was_fetched_before_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "models--a--b" / "refs").mkdir(parents=True)
    (tmp_path / "models--a--b" / "refs" / "main").write_text("c" * 40)
    shutil.copytree(folder("tiny-draft"), tmp_path / "models--a--b" / "snapshots" / ("c" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    fetched, embedded = ATTS("a/b", HashModel("target")).draft, connect("draft", "tiny-draft")
    assert fetched.identity["tokenizer"] == embedded.identity["tokenizer"]
