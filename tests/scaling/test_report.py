"""Reports, by numbers that were worked out by hand on a few records."""

import json
from collections.abc import Iterable

import numpy as np
import pytest

from pyquiet.scaling.backends.base import Usage
from pyquiet.scaling.conformal import Rule, total_law
from pyquiet.scaling.figures import Share, bootstrap, ks_distance
from pyquiet.scaling.records import Decision, Key, Record, Timing
from pyquiet.scaling.report import Report, Tally
from pyquiet.scaling.slots import barrier_seconds, peak_tokens, service_seconds, slots
from pyquiet.scaling.table import Rows, Table

HEADER = {
    "version": 1,
    "engine": "sync",
    "config": {"takeover_rate": 0.4, "tail": "budget", "pools": {"draft": 2, "score": 1, "target": 1}},
    "questions": [{"id": "a", "answer": "5", "group": ""}, {"id": "b", "answer": "7", "group": ""}],
}


def stage(
    question: str,
    chain: int,
    turn: int,
    name: str,
    start: float,
    end: float,
    slot: int = 0,
    *,
    tokens: int = 10,
    decision: Decision | None = None,
    score: float | None = None,
    **key: object,
) -> Record:
    return Record(
        Key(**{"phase": "run", "question": question, "chain": chain, "turn": turn, "stage": name, **key}),  # type: ignore[arg-type]
        usage=Usage(100, 40, tokens),
        timing=Timing(start, start, end, slot, 2 if name == "target" else 1),
        decision=decision,
        score=score,
    )


def judged(p: float, action: str = "accept", *, guaranteed: bool = True) -> Decision:
    return Decision(action, "p", p, 4, "v", guaranteed)  # type: ignore[arg-type]


def end(question: str, chain: int, answer: str | None, outcome: str = "answer") -> Record:
    return Record(Key("run", question, chain, 1, "end"), outcome=outcome, answer=answer)  # type: ignore[arg-type]


# Question a: two chains, drafts end at 2 and 4, scores one behind the other, chain 1 is taken over until 12.
RUN = [
    stage("a", 0, 0, "draft", 0, 2, 0),
    stage("a", 1, 0, "draft", 0, 4, 1, tokens=20),
    stage("a", 0, 0, "score", 4, 5, tokens=1, decision=judged(0.8), score=0.5),
    stage("a", 1, 0, "score", 5, 6, tokens=1, decision=judged(0.2, "continue"), score=1.5),
    stage("a", 1, 0, "target", 6, 12, tokens=30),
    end("a", 0, "5.0"),
    end("a", 1, "6"),
    stage("b", 0, 0, "draft", 12, 14, 0),
    stage("b", 1, 0, "draft", 12, 14, 1),
    stage("b", 0, 0, "score", 14, 15, tokens=1, decision=judged(0.6, guaranteed=False), score=0.1),
    Record(Key("run", "b", 1, 0, "score"), decision=Decision("accept", "forced")),
    end("b", 0, None, "turns"),
    end("b", 1, "7"),
]


def rows(records: Iterable[Record]) -> Rows:
    return Table(records).rows()


@pytest.fixture(scope="module")
def report() -> Report:
    return Report.of(HEADER, RUN)


def test_takeovers(report: Report) -> None:
    row = report.takeovers
    assert (row.decisions, row.taken, row.judged, row.guaranteed) == (4, 1, 3, 2)
    # Questions 1/2 and 0/2: drawn anew the mean is 0, 1/4 or 1/2, the outer ones a quarter of the time each.
    assert row.rate == Share(0.25, 0.0, 0.5)
    assert report.turns == {0: row}
    assert report.questions == {"a": 0.5, "b": 0.0}
    assert report.reasons == {"p": 3, "forced": 1}
    assert report.outcomes == {"answer": 3, "turns": 1}


def test_the_promised_band_is_that_of_the_rule(report: Report) -> None:
    rule = Rule(0.4)
    mean, low, high = rule.takeover_count(4, 3)
    assert report.takeovers.promised == pytest.approx(2 / 5) == pytest.approx(mean / 3)
    assert report.takeovers.band == (low, high) == (0, 3)


def test_bands_of_several_banks_are_narrower_than_that_of_one() -> None:
    def run(bank: str) -> list[Record]:
        return [
            stage("a", i, 0, "score", 0, 1, decision=Decision("accept", "p", 0.5, 16, bank or str(i)))
            for i in range(100)
        ]

    one, many = (Report.of(HEADER, run(bank)).takeovers for bank in ("one", ""))
    assert one.band == Rule(0.4).takeover_count(16, 100)[1:]
    assert (many.promised, one.promised) == pytest.approx((6 / 17, 6 / 17))
    assert many.band == (28, 43)  # binomial of 100 and 6/17


def test_many_banks_with_many_decisions_have_the_law_of_the_sum() -> None:
    rule, counts = Rule(0.4), (3, 3, 5, 8)
    run = [
        stage("a", i, 0, "score", 0, 1, decision=Decision("accept", "p", 0.5, 9, str(bank)))
        for bank, count in enumerate(counts)
        for i in range(count)
    ]
    law = np.ones(1)
    for count in counts:
        law = np.convolve(law, rule.takeover_law(9, count))
    laws = [(rule.takeover_law(9, 3), 2), (rule.takeover_law(9, 5), 1), (rule.takeover_law(9, 8), 1)]
    assert total_law(laws) == pytest.approx(law, abs=1e-15)
    assert Report.of(HEADER, run).takeovers.band == tuple(np.searchsorted(law.cumsum(), (0.05, 0.95)))


def test_near_ties_are_counted() -> None:
    run = [
        stage("a", i, 0, "score", 0, 1, decision=Decision("accept", "p", 0.5, 9, "v", True, "", i < 2))
        for i in range(5)
    ]
    row = Report.of(HEADER, run).takeovers
    assert (row.judged, row.near_ties) == (5, 2)
    assert "2 decisions within 1e-06 of a cut" in str(Report.of(HEADER, run))
    assert "of a cut" not in str(Report.of(HEADER, run[2:]))


def test_distance_of_p_values(report: Report) -> None:
    assert report.takeovers.ks == pytest.approx(0.2667, abs=1e-3)  # at 0.6: one of three below it
    assert report.takeovers.critical == pytest.approx(1.628 / 3**0.5)
    assert "0.267 (0.940)" in str(report)
    assert ks_distance(np.array([0.5])) == 0.5
    assert ks_distance(np.array([0.1, 0.2])) == pytest.approx(0.8)


def test_accuracy(report: Report) -> None:
    values = {name: share.value for name, share in report.accuracy.items()}
    # a: one of two right; a tie, which 5 wins by its score of 0.5. b: one of two right, and that the only vote.
    assert values == {"pass@1": 0.5, "pass@2": 1.0, "maj@2": 1.0, "weighted@2": 1.0}


def test_a_vote_without_a_score_weighs_nothing() -> None:
    scored = [stage("a", 2, 0, "score", 0, 1, score=4.0)]
    run = [*scored, end("a", 0, "6"), end("a", 1, "6"), end("a", 2, "5")]
    values = {name: share.value for name, share in Report.of(HEADER, run).accuracy.items()}
    assert (values["maj@3"], values["weighted@3"]) == (0.0, 1.0)


def test_where_nothing_was_scored_votes_have_no_weights() -> None:
    run = [end("a", 0, "6"), end("a", 1, "6"), end("a", 2, "5")]
    assert set(Report.of(HEADER, run).accuracy) == {"pass@1", "pass@2", "pass@3", "maj@3"}


def test_cancelled_chains_are_no_samples() -> None:
    run = [end("a", 0, "5"), end("a", 1, None, "cancelled"), end("a", 2, None, "failed")]
    values = {name: share.value for name, share in Report.of(HEADER, run).accuracy.items()}
    assert values == {"pass@1": 0.5, "pass@2": 1.0, "maj@3": 1.0}


def test_cost(report: Report) -> None:
    draft, target = report.cost["draft"], report.cost["target"]
    assert (draft.requests, draft.prompt_tokens, draft.cached_tokens, draft.completion_tokens) == (4, 400, 160, 50)
    assert (target.requests, target.completion_tokens, target.retries) == (1, 30, 1)
    assert report.cost["score"].requests == 3
    assert report.target_share == 30 / 80
    assert report.peak_target_tokens == 130
    assert report.kv_bytes(8) == 1040
    assert "at most 130 tokens in the requests that the target wrote for at once\n" in str(report)
    told = Report.of(HEADER | {"kv_bytes_per_token": {"target": 2**16}}, RUN)
    assert "130 tokens in the requests that the target wrote for at once, 8.1 MiB of keys and values\n" in str(told)


def test_requests_that_were_lost_are_counted_apart(report: Report) -> None:
    lost = [lost_request("b", 2, "draft", tries=6), lost_request("b", 3, "draft"), lost_request("b", 3, "target", n=1)]
    more = Report.of(HEADER, [*RUN, *lost])
    draft, before = more.cost["draft"], report.cost["draft"]
    assert (draft.lost, draft.retries, draft.sent) == (2, 5, before.sent + 7)
    assert (draft.requests, draft.completion_tokens) == (before.requests, before.completion_tokens)
    assert more.cost["target"].lost == 1
    assert more.service == report.service + 3 * 0.5  # slots were held
    assert (more.takeovers, more.outcomes, more.reasons) == (report.takeovers, report.outcomes, report.reasons)
    assert "requests that nothing came of, their tokens counted where they were told: 2 draft, 1 target" in str(more)
    assert [held.start for held in slots([*RUN, *lost])["target"]] == [6, 14.5]


def lost_request(question: str, chain: int, of: str, *, tries: int = 1, n: int = 0) -> Record:
    key = Key("run", question, chain, 0, "lost", n)
    return Record(key, timing=Timing(12, 14.5, 15, 0, tries), reason=of, outcome="failed")


def test_time(report: Report) -> None:
    assert report.wall == 15
    assert report.throughput == {"answers_per_minute": 12.0, "tokens_per_second": 80 / 15}
    assert "12.0 chains with an answer a minute, 5.3 tokens written a second" in str(report)
    assert "the target wrote 37.5% of the tokens" in str(report)
    assert "for a chain 4.0 and 10.9 s, for a question 7.5 and 11.5 s" in str(report)
    assert report.utilisation == {"draft": 10 / 30, "score": 3 / 15, "target": 6 / 15}
    assert report.service == 10 + 3 + 6
    # Windows: drafts of a from 2 to 4 (3 of 4 slots idle), its scores from 5 to 6 (3 idle); b waits for nobody.
    assert report.barrier == 2 * 3 + 1 * 3
    assert report.intensity == pytest.approx(19 / 9)
    assert report.barrier_share == pytest.approx(9 / 28)
    assert report.latency["question"] == pytest.approx((np.percentile([12, 3], 50), np.percentile([12, 3], 95)))
    assert report.latency["chain"][0] == pytest.approx(4)  # 5, 12, 3 and 2 seconds


def test_without_barriers_there_is_no_intensity() -> None:
    report = Report.of(HEADER | {"engine": "async"}, RUN)
    assert (report.barrier, report.intensity, report.barrier_share) == (0.0, None, 0.0)
    assert "no barriers: T_s = 0 s, T_c = 19.0 s" in str(report)


def test_calibration_is_part_of_every_speed_up(report: Report) -> None:
    apart = [stage("z", 0, 0, "draft", 0, 5, phase="calibrate")]
    with_bank = Report.of(HEADER, RUN, calibration=apart)
    assert (with_bank.wall, with_bank.calibration) == (15, 5)
    assert with_bank.calibration_cost["draft"].completion_tokens == 10
    assert report.speedup(with_bank, "itself, calibrated") == {"baseline": "itself, calibrated", "speedup": 20 / 15}
    first = [stage("a", 0, 0, "draft", -10, 0, phase="presample"), *RUN]
    assert Report.of(HEADER, first).wall == 25
    assert "to calibrate besides: 1 requests, 10 tokens written, 100 read (40 cached)" in str(with_bank)
    assert "besides" not in str(report)
    assert Report.of(HEADER, first).calibration_cost["draft"].requests == 1
    assert Report.of(HEADER, first).cost == report.cost


def test_turns_are_calibrated_one_after_the_other_each_by_a_clock_of_its_own(report: Report) -> None:
    first = [stage("y", 0, 0, "draft", 0, 5, phase="calibrate"), stage("y", 1, 0, "draft", 1, 6, phase="calibrate")]
    second = [stage("z", 2, turn, "draft", 4 * turn, 4 * turn + 3, phase="calibrate") for turn in (0, 1)]
    with_bank = report.calibrated(Table([*first, *second]))
    assert with_bank.calibration == 6 + 7
    assert "15.0 s, and 13.0 s to calibrate before" in str(with_bank)
    assert "15.0 s, no calibration counted" in str(report)


def test_what_was_drafted_beforehand_counts_with_the_turn_that_it_was_drafted_for(report: Report) -> None:
    first = [stage("y", 0, 0, "draft", 0, 5, phase="calibrate")]
    cold = [stage("z", chain, 0, "draft", 0, 3 + chain, phase="presample") for chain in (0, 1)]
    second = [*cold, stage("z", 1, 0, "draft", 4, 11, phase="calibrate")]
    assert report.calibrated(Table([*first, *second])).calibration == 5 + 11


def test_second_attempts_are_no_decisions_that_a_rate_is_promised_for() -> None:
    run = [
        stage("a", 0, 0, "score", 0, 1, decision=judged(0.1, "resample")),
        stage("a", 0, 0, "score", 1, 2, decision=judged(0.1, "accept"), attempt=1),
    ]
    assert (Report.of(HEADER, run).takeovers.decisions, Report.of(HEADER, run).takeovers.taken) == (1, 1)


def test_a_tally_gives_the_report_of_the_same_records(report: Report) -> None:
    tally = Tally(HEADER)
    for record in RUN:
        tally.add(record)
    assert tally.report() == report


def test_an_empty_run_has_a_report() -> None:
    empty = Report.of(HEADER, [])
    assert (empty.wall, empty.takeovers.rate.value, empty.accuracy) == (0.0, None, {})
    json.dumps(empty.to_dict(), allow_nan=False)
    assert str(empty)


def test_a_report_in_words_and_as_json(report: Report) -> None:
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["turns"]["0"]["band"] == [0, 3]
    assert values["intensity"] == pytest.approx(19 / 9)
    text = str(report)
    for words in ("25.0% [0.0%, 50.0%]", "40.0%", "0 to 3 of 3", "pass@1: 50.0%", "r = T_c / T_s = 2.11", "forced 1"):
        assert words in text
    assert "for independent chains; chains of one question are alike" in text
    assert "nothing came of" not in text
    assert "independent" not in str(Report.of({}, RUN))  # no rule, no band


def test_the_bootstrap_draws_questions() -> None:
    taken, decided = np.array([8.0] * 20 + [0.0] * 20), np.full(40, 8.0)
    share = bootstrap(taken, decided, 0)
    assert share == bootstrap(taken, decided, 0)
    assert share.value == 0.5
    assert share.low is not None
    assert share.high is not None
    # Forty questions, half of them at 1: a standard error of 0.079, though there are 320 decisions.
    assert (share.high - share.low) / 2 == pytest.approx(1.96 * 0.079, rel=0.1)
    assert bootstrap(np.array([0.0]), np.array([0.0]), 0) == Share(None, None, None)
    parts, totals = np.arange(7.0) % 3, np.arange(7.0) + 2
    assert bootstrap(parts, totals, 0) == bootstrap(parts[::-1], totals[::-1], 0)


def test_slots_tell_who_held_them_when() -> None:
    held = slots(RUN)
    assert [(h.slot, h.start, h.end) for h in held["draft"]] == [(0, 0, 2), (1, 0, 4), (0, 12, 14), (1, 12, 14)]
    assert held["target"][0].key == Key("run", "a", 1, 0, "target")
    assert service_seconds(rows(RUN).stage("score")) == 3
    assert barrier_seconds(rows([]), {"draft": 2}) == 0
    both = [stage("a", i, 0, "target", i, i + 2, tokens=10 * (i + 1)) for i in range(2)]
    assert peak_tokens(rows(both)) == 110 + 120
    assert peak_tokens(rows([both[0], stage("a", 1, 0, "target", 2, 3)])) == 110
