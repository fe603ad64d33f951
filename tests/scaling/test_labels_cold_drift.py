"""What the promise is made of by the front door: three labels, cold starts, drift, and learning that is taken back."""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyquiet.scaling import (
    ATTS,
    Adaptive,
    Bank,
    ConformalPolicy,
    DriftMonitor,
    MeanNLL,
    Online,
    PerQuestion,
    Plan,
    Pooled,
    Pools,
    Question,
    Report,
    Rule,
    Sampling,
    TakeoverLimit,
    read_journal,
)
from pyquiet.scaling.calibration import Calibrator
from pyquiet.scaling.cells import Cell
from pyquiet.scaling.policy import Chunk
from pyquiet.scaling.records import Decision, Key, Record

from .fake_models import HashModel

PLAN = Plan(chains=4, turns=3, draft=Sampling(40), target=Sampling(40), pools=Pools(8, 8, 8, 16))
BANK = [Question(f"b{i}", f"Bank {i}?") for i in range(30)]
ASKED = [Question(f"q{i}", f"Asked {i}?", answer="2") for i in range(6)]
SCORES = Bank(np.linspace(0.5, 1.5, 19))


def atts(plan: Plan = PLAN, **options: Any) -> ATTS:
    draft, target = options.pop("models", None) or [HashModel(name) for name in ("draft", "target")]
    return ATTS(draft, target, plan=plan, score=MeanNLL(min_tokens=1), **options)


def transcript(path: Path) -> list[Record]:
    kept = (replace(r, timing=None) for r in read_journal(path)[1] if r.key.stage != "lost")
    return sorted(kept, key=lambda record: record.key)


@pytest.mark.parametrize("on_takeover", ["continue", "replace", "resample"])
def test_the_worst_chunks_are_discarded_and_drafted_again(on_takeover: Any, tmp_path: Path) -> None:
    options = {"calibration": Pooled(SCORES), "takeover_rate": 0.5, "discard_rate": 0.2, "on_takeover": on_takeover}
    result = atts(**options).run(ASKED, journal=tmp_path / "a.jsonl")
    atts(**options).run(ASKED, journal=tmp_path / "s.jsonl", engine="sync")
    records = transcript(tmp_path / "a.jsonl")
    assert records == transcript(tmp_path / "s.jsonl")
    stages, labels = {record.key for record in records}, Counter[str]()
    for record in records:
        key, decision = record.key, record.decision
        if decision is not None and decision.p is not None:
            label = "discard" if decision.p <= 0.2 else "takeover" if decision.p <= 0.5 else "accept"
            again = (label == "discard" or (label != "accept" and on_takeover == "resample")) and key.attempt < 2
            labels[label] += 1
            assert (decision.action == "resample") == again
            assert (decision.reason == "discard") == (again and label == "discard")
            assert (replace(key, stage="draft", attempt=key.attempt + 1) in stages) == again
            taken = label != "accept" and not again and on_takeover != "resample"
            assert (replace(key, stage="target", attempt=0) in stages) == taken or again
            assert not (key.attempt and decision.guaranteed)
    assert min(labels.values()) > 5
    thrown = [r for r in records if r.decision is not None and r.decision.action == "resample"]
    assert result.report.discards == len(thrown)
    assert result.report.takeovers.discarded == sum(not r.key.attempt for r in thrown)
    assert f"{len(thrown)} drafts thrown away" in str(result.report)


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, chain_tokens=60)])
@pytest.mark.parametrize("on_takeover", ["replace", "resample"])
def test_a_discarded_draft_is_in_no_chain(on_takeover: Any, plan: Plan, tmp_path: Path) -> None:
    """Not even where all drafts of a turn are thrown away, or where nothing is left to draft another one with."""
    options = {"calibration": PerQuestion(), "takeover_rate": 0.7, "discard_rate": 0.6, "on_takeover": on_takeover}
    result = atts(plan, **options).run(BANK, journal=tmp_path / "run.jsonl")
    records = {record.key: record for record in transcript(tmp_path / "run.jsonl") if record.key.phase == "run"}
    chains = {(one.question.id, i): chain for one in result.questions for i, chain in enumerate(one.chains)}
    spent = long = 0
    for key, record in records.items():
        if record.decision is not None and record.decision.reason == "discard":
            draft = records[replace(key, stage="draft")]
            if len(draft.text.strip()) > 6:  # shorter ones may come again
                long += 1
                assert draft.text.strip() not in chains[key.question, key.chain].text
            spent += replace(key, stage="draft", attempt=key.attempt + 1) not in records
    assert long > 20
    assert (spent > 5) == (plan.chain_tokens is not None)


def test_a_discarded_draft_counts_as_not_kept_and_so_the_promise_holds() -> None:
    """Over many banks the share of first drafts that are not kept is that of the rule, however many are discarded."""
    rates = []
    for seed in range(12):
        runner = atts(replace(PLAN, seed=seed), chains=1, discard_rate=0.25, calibration=Pooled(SCORES))
        runner.calibrate([f"{seed} bank {i}?" for i in range(59)], kind="hierarchical", chains=1)
        result = runner.run([f"{seed} test {i}?" for i in range(60)])
        assert result.guaranteed[0][0]
        assert 0 < result.report.turns[0].discarded < result.report.turns[0].taken
        rates.append(result.report.turns[0].rate.value)
    # Twelve Beta(24, 36) rates, each seen in 60 decisions: a standard deviation of .026.
    assert abs(np.mean(rates) - 0.4) < 4 * 0.026


def test_a_bank_is_good_for_the_discards_that_it_was_made_with() -> None:
    made = atts().calibrate(BANK, chains=1)
    for options in ({"discard_rate": 0.2}, {"on_takeover": "resample", "resamples": 1}):
        with pytest.raises(ValueError, match=r"rule=.*calibrate again"):
            atts(calibration=made, **options).run(ASKED)  # type: ignore[arg-type]
    first = atts(discard_rate=0.2)
    first.calibrate(BANK, chains=1)
    assert first.run(ASKED).guaranteed[1][0]


@pytest.mark.parametrize(("on_cold", "action"), [("takeover", "continue"), ("accept", "accept")])
def test_a_bank_that_is_too_small_decides_nothing(on_cold: Any, action: str, tmp_path: Path) -> None:
    runner = atts(calibration=Pooled(SCORES, n_min=20), on_cold=on_cold)
    result = runner.run(ASKED, journal=tmp_path / "run.jsonl")
    decisions = [r.decision for r in read_journal(tmp_path / "run.jsonl")[1] if r.decision is not None]
    assert {(d.action, d.reason, d.p) for d in decisions} == {(action, "cold", None)}
    assert result.guaranteed[0] == (False, "decided otherwise: cold")
    assert result.report.reasons == {"cold": len(decisions)}


def test_a_cold_question_drafts_a_bank_of_its_own_until_there_is_one(tmp_path: Path) -> None:
    def run(name: str, engine: Any = "async") -> Any:
        bank = Online(update="epoch", batch=2, n_min=6)
        return atts(calibration=bank, on_cold="presample").run(ASKED, journal=tmp_path / name, engine=engine)

    result = run("a.jsonl")
    records = read_journal(tmp_path / "a.jsonl")[1]
    assert {r.key.question for r in records if r.key.phase == "presample"} == {"q0", "q1"}
    first = {r.key.question: r.decision for r in records if r.key.phase == "run" and r.decision and not r.key.turn}
    assert {question: (d.guaranteed, d.n) for question, d in first.items() if d} == {
        "q0": (True, 4), "q1": (True, 4), "q2": (False, 8), "q3": (False, 8), "q4": (False, 16), "q5": (False, 16)
    }  # fmt: skip
    assert not result.guaranteed[0][0]  # of all questions
    run("s.jsonl", "sync")
    assert transcript(tmp_path / "a.jsonl") == transcript(tmp_path / "s.jsonl")
    lines = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_bytes(b"".join(lines[: len(lines) // 2]))
    run("half.jsonl")
    assert transcript(tmp_path / "half.jsonl") == transcript(tmp_path / "a.jsonl")


def test_who_is_cold_by_the_clock_is_promised_nothing() -> None:
    runner = atts(calibration=Online(update="stream", n_min=6), on_cold="presample")
    assert "depends on the clock" in runner.run(ASKED[:1]).guaranteed[0][1]


def test_on_cold_matters_to_a_bank_only_where_first_turns_are_cold() -> None:
    warm = atts().calibrate(BANK, chains=1)
    assert atts(calibration=warm, on_cold="accept").run(ASKED).guaranteed[1][0]
    cold = atts(on_cold="accept").calibrate(BANK, chains=1, n_min=11)  # of 10 questions a turn
    with pytest.raises(ValueError, match=r"on_cold='accept'.*calibrate again"):
        atts(calibration=cold).run(ASKED)


GROWING: list[tuple[str, dict[str, Any]]] = [
    ("p", {"on_takeover": "resample"}),
    ("discard", {"takeover_rate": 0.6, "discard_rate": 0.5}),
    ("cold", {"on_cold": "accept"}),
    ("forced", {"limit": TakeoverLimit(per_question=1)}),
]


@pytest.mark.parametrize(("reason", "options"), GROWING)
def test_every_first_draft_enters_a_bank_that_grows_whatever_became_of_it(
    reason: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """And no other: which scores enter must depend on neither scores nor decisions."""
    bank = Online(update="stream", n_min=6)
    atts(calibration=bank, **options).run(ASKED, journal=tmp_path / "run.jsonl", engine="sync")
    records = [r for r in read_journal(tmp_path / "run.jsonl")[1] if r.decision is not None and not r.key.turn]
    first = [r for r in records if not r.key.attempt]
    assert len(first) == 24
    assert sum(r.decision.reason == reason for r in first if r.decision) > 3
    assert len(records) > 24 or reason in ("cold", "forced")
    assert bank.bank.scores.tolist() == sorted(r.score for r in first if r.score is not None)


def test_a_limit_bends_neither_the_watch_nor_a_rate_that_adapts() -> None:
    def run(calibrator: Calibrator, **options: Any) -> Any:
        return atts(calibration=calibrator, **options).run(BANK, engine="sync").report

    cap, watched = TakeoverLimit(per_question=0), {"tail": "smoothed", "drift": DriftMonitor(0.01)}
    free, capped = run(Online(SCORES), **watched), run(Online(SCORES), limit=cap, **watched)
    assert capped.takeovers.taken == 0 < capped.reasons["forced"]
    assert capped.drift[0] == free.drift[0]  # the good chunks alone would look like drift
    adaptive = Adaptive(Pooled(SCORES), step=0.2)
    run(adaptive, limit=cap)
    assert abs(adaptive.taken / adaptive.seen - 0.4) <= (0.6 + 0.2) / (0.2 * adaptive.seen) < 0.1


class Drifting(HashModel):
    """Likes what stands behind some questions much less than the bank's."""

    async def score(self, request: Any) -> Any:
        scored = await super().score(request)
        worse = 1.0 if "Asked" in self.codec.decode(request.prompt.ids or ()) else 0.0
        return replace(scored, log_probs=tuple(x - worse for x in scored.log_probs))


def drifting(**options: Any) -> ATTS:
    models = [HashModel("draft"), Drifting("target")]
    return atts(models=models, drift=DriftMonitor(0.2), tail="smoothed", **options)


MANY = [f"Asked {i}?" for i in range(12)]
MANY_IDS = [str(i) for i in range(12)]


def test_drift_withdraws_the_promise_of_its_turn(tmp_path: Path) -> None:
    runner, journal, bank = drifting(), tmp_path / "run.jsonl", tmp_path / "bank.jsonl"
    runner.calibrate(BANK, kind="hierarchical", chains=1, journal=bank)
    calm = runner.run([f"Other {i}?" for i in range(12)])
    assert calm.guaranteed[0][0]
    assert calm.report.drift[0].alarm is None
    assert calm.report.drift[0].watched == 12
    assert calm.report.drift[0].e_value < 10
    with pytest.warns(UserWarning, match="scores of turn 0 have drifted"):
        result = runner.run(MANY, journal=journal)
    watch = result.report.drift[0]
    assert watch.alarm is not None
    assert watch.alarm.turn == 0
    assert watch.alarm.e_value >= 2 / 0.2
    assert watch.alarm.seen <= watch.watched == 12
    assert result.guaranteed[0] == (False, str(watch.alarm))
    assert (result.report.turns[0].guaranteed, result.report.takeovers.guaranteed) == (0, 0)
    assert str(watch.alarm) in str(result.report)
    assert Report.of(*read_journal(journal), calibration=read_journal(bank)[1]) == result.report
    assert result.report.to_dict()["drift"]["0"]["alarm"]["seen"] == watch.alarm.seen


@pytest.mark.filterwarnings("ignore:scores of turn")
@pytest.mark.parametrize("make", [PerQuestion, lambda: Online(SCORES)])
def test_a_run_that_goes_on_knows_of_the_drift_before(make: Callable[[], Calibrator], tmp_path: Path) -> None:
    whole, half = tmp_path / "whole.jsonl", tmp_path / "half.jsonl"
    wanted = drifting(calibration=make()).run(MANY, journal=whole).report
    lines = whole.read_bytes().splitlines(keepends=True)
    half.write_bytes(b"".join(lines[: len(lines) // 2]))
    report = drifting(calibration=make()).run(MANY, journal=half).report
    assert report == Report.of(*read_journal(half))
    assert {turn: watch.watched for turn, watch in report.drift.items()} == {0: 12}
    assert (report.drift[0].alarm is None) == (wanted.drift[0].alarm is None) == (make is PerQuestion)


def test_a_policy_of_ones_own_tells_of_drift_too() -> None:
    bank, monitor = Online(SCORES), DriftMonitor(0.2)
    policy = ConformalPolicy(bank, Rule(0.4), drift=monitor)
    runner = atts(models=[HashModel("draft"), Drifting("target")], policy=policy)
    for _ in range(2):  # the second run is watched anew
        with pytest.warns(UserWarning, match="turn 0"):
            result = runner.run(MANY)
        assert result.report.drift[0].alarm == monitor.alarms[0]
        assert monitor.seen == {0: 12}


def test_an_alarm_freezes_a_bank_that_grows_with_what_it_has_not_taken_in_yet() -> None:
    bank, monitor = Online(SCORES, update="epoch", batch=2), DriftMonitor(0.2, freeze=True)
    policy = ConformalPolicy(bank, Rule(0.4), drift=monitor)
    cell, begun = Cell("q", "", 0), bank.version
    chunk = Chunk(Key("run", "q", 0, 0, "score"), cell, 1.0)
    policy.observe(chunk, Decision("accept", "p", 0.5, 19))
    with pytest.warns(UserWarning, match="drifted"):
        policy.observe(chunk, Decision("accept", "p", 1e-9, watched=1e-9))
    policy.advance()
    assert bank.version == begun


def test_a_monitor_of_ones_own_is_taken_back_after_an_abort(tmp_path: Path) -> None:
    """Else the journal would show it twice what it has seen, and a frozen bank would not learn what it had."""

    def crash(record: Record) -> None:
        if record.key.question == MANY_IDS[-1]:
            raise RuntimeError("crash")

    def runner() -> ATTS:
        bank, monitor = Online(SCORES, update="epoch", batch=6), DriftMonitor(0.8, freeze=True)
        policy = ConformalPolicy(bank, Rule(0.4), drift=monitor)
        return atts(models=[HashModel("draft"), Drifting("target")], policy=policy)

    whole, half = runner(), runner()
    with pytest.warns(UserWarning, match="drifted"):
        whole.run(MANY, journal=tmp_path / "whole.jsonl", engine="sync")
    for action in (crash, None):
        context = pytest.raises(RuntimeError, match="crash") if action else nullcontext()
        with context, pytest.warns(UserWarning, match="drifted"):
            half.run(MANY, journal=tmp_path / "half.jsonl", engine="sync", on_record=action)
        assert isinstance(half.policy, ConformalPolicy)
        assert half.policy.drift is not None
        assert bool(half.policy.drift.seen) == (action is None)
    assert isinstance(whole.policy, ConformalPolicy)
    assert half.policy.drift == whole.policy.drift
    assert half.policy.calibrator.version == whole.policy.calibrator.version
    assert transcript(tmp_path / "half.jsonl") == transcript(tmp_path / "whole.jsonl")


def test_bad_settings_of_the_promise_are_named() -> None:
    for options, words in (
        ({"discard_rate": 0.5}, r"discard_rate must lie in \[0, takeover_rate\], got 0.5"),
        ({"resamples": -1}, "resamples must be at least 0"),
        ({"resamples": 0, "on_takeover": "resample"}, "resamples must be at least 1 with on_takeover"),
        ({"on_cold": "wait"}, "on_cold must be"),
        ({"plan": replace(PLAN, early_majority=True), "drift": DriftMonitor()}, "drift watches what is promised"),
    ):
        with pytest.raises(ValueError, match=words):
            atts(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"make": PerQuestion, "discard_rate": 0.2},
        {"make": lambda: Online(update="epoch", batch=2, n_min=6), "on_cold": "presample", "discard_rate": 0.2},
        {
            "make": lambda: Online(SCORES, update="epoch", batch=2),
            "drift": DriftMonitor(0.2),
            "on_takeover": "resample",
        },
    ],
)
def test_the_front_door_resumes_from_every_prefix(options: dict[str, Any], tmp_path: Path) -> None:
    """Spec 16, T9, with banks that are filled by the run itself."""
    options = dict(options)
    plan, make = replace(PLAN, chains=2), options.pop("make")

    def run(name: str) -> int:
        models = [HashModel("draft"), HashModel("target")]
        atts(plan, models=models, calibration=make(), **options).run(ASKED[:3], journal=tmp_path / name)
        return sum(len(model.requests) for model in models)

    requests = run("whole.jsonl")
    wanted, lines = transcript(tmp_path / "whole.jsonl"), (tmp_path / "whole.jsonl").read_bytes().splitlines(True)
    records = read_journal(tmp_path / "whole.jsonl")[1]
    for cut in range(len(lines)):
        (tmp_path / "part.jsonl").write_bytes(b"".join(lines[: cut + 1]))
        assert run("part.jsonl") == requests - sum(record.timing is not None for record in records[:cut])
        assert transcript(tmp_path / "part.jsonl") == wanted


@pytest.mark.parametrize(
    ("made", "now"),
    [
        ({"update": "epoch", "batch": 2}, {"update": "epoch", "batch": 5}),
        ({"update": "window", "window": 10}, {"update": "window", "window": 3}),
    ],
)
def test_a_bank_that_learns_otherwise_does_not_go_on(made: Any, now: Any, tmp_path: Path) -> None:
    atts(calibration=Online(SCORES, **made)).run(ASKED[:1], journal=tmp_path / "run.jsonl")
    with pytest.raises(ValueError, match=r"was begun with another config\.calibrator"):
        atts(calibration=Online(SCORES, **now)).run(ASKED[:1], journal=tmp_path / "run.jsonl")
    adaptive = [Adaptive(Online(SCORES, **made), step=step) for step in (0.02, 0.9)]
    atts(calibration=adaptive[0]).run(ASKED[:1], journal=tmp_path / "adaptive.jsonl")
    with pytest.raises(ValueError, match=r"was begun with another config\.calibrator"):
        atts(calibration=adaptive[1]).run(ASKED[:1], journal=tmp_path / "adaptive.jsonl")


def test_banks_of_a_cold_start_go_on_after_an_abort(tmp_path: Path) -> None:
    def make(bank: Online) -> ATTS:
        return atts(calibration=bank, on_cold="presample")

    bank, seen = Online(update="epoch", batch=2, n_min=6), list[Record]()

    def crash(record: Record) -> None:
        seen.append(record)
        if len(seen) == 90:
            raise RuntimeError("crash")

    runner, begun = make(bank), bank.version
    with pytest.raises(RuntimeError, match="crash"):
        runner.run(ASKED, journal=tmp_path / "run.jsonl", on_record=crash)
    assert bank.version == begun
    assert runner.run(ASKED, journal=tmp_path / "run.jsonl").finished
    make(Online(update="epoch", batch=2, n_min=6)).run(ASKED, journal=tmp_path / "whole.jsonl")
    assert transcript(tmp_path / "run.jsonl") == transcript(tmp_path / "whole.jsonl")


BANKS: list[Callable[[], Calibrator]] = [
    PerQuestion,
    lambda: Online(SCORES, update="epoch", batch=2),
    lambda: Online(SCORES, update="window", window=10),
    lambda: Adaptive(Online(SCORES, update="stream")),
]


@pytest.mark.parametrize("make", BANKS)
@pytest.mark.parametrize("own", [False, True])
def test_the_same_object_goes_on_after_an_abort(make: Callable[[], Calibrator], own: bool, tmp_path: Path) -> None:
    bank, seen = make(), list[Record]()

    def crash(record: Record) -> None:
        seen.append(record)
        if len(seen) == 90:
            raise RuntimeError("crash")

    runner = atts(policy=ConformalPolicy(bank, Rule(0.4))) if own else atts(calibration=bank)
    begun = bank.version
    with pytest.raises(RuntimeError, match="crash"):
        runner.run(ASKED, journal=tmp_path / "run.jsonl", on_record=crash)
    assert bank.version == begun
    kept = len(read_journal(tmp_path / "run.jsonl")[1])
    assert kept >= 90
    again = runner.run(ASKED, journal=tmp_path / "run.jsonl")
    assert again.finished
    assert bank.version != begun
    if isinstance(bank, PerQuestion) or getattr(bank, "update", "") == "epoch":
        whole = atts(policy=ConformalPolicy(make(), Rule(0.4))) if own else atts(calibration=make())
        whole.run(ASKED, journal=tmp_path / "whole.jsonl")
        assert transcript(tmp_path / "run.jsonl") == transcript(tmp_path / "whole.jsonl")
