"""P-values, rules and calibrators: exact probabilities where they can be counted, and the specification's T1 to T7."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pyquiet.scaling.calibration import Hierarchical, PerTurn, Pooled, fit
from pyquiet.scaling.cells import Cell
from pyquiet.scaling.conformal import (
    Bank,
    Budget,
    ClusteredBank,
    Rule,
    attainable_rates,
    beta_binomial,
    p_high,
    p_low,
    p_smoothed,
    rank,
)
from pyquiet.scaling.learning import Adaptive, Online
from pyquiet.scaling.policy import Chunk, ConformalPolicy, OfficialPolicy, RankPolicy, RSDPolicy, SpecReasonPolicy
from pyquiet.scaling.records import Key


def bank(scores: Any) -> Bank:
    return Bank(np.asarray(scores, dtype=float))


def fires(rule: Rule, scores: Any, u: float, uniform: float = 0.5) -> bool:
    return rule.label(rank(bank(scores), u, uniform, guaranteed=True, why="")) != "accept"


def exact_rate(n: int, decide: Any) -> float:
    """P(takeover) for n + 1 exchangeable scores without ties: the new one has each rank equally often."""
    scores = np.arange(n + 1.0)
    return float(np.mean([decide(np.delete(scores, i), scores[i]) for i in range(n + 1)]))


def test_p_values_count_as_their_formulas_say() -> None:
    held = [3.0, 1.0, 2.0, 2.0, 5.0]
    for u in (0.0, 1.0, 2.0, 2.5, 5.0, 6.0):
        assert p_low(bank(held), u) == (1 + sum(x >= u for x in held)) / 6
        assert p_high(bank(held), u) == (1 + sum(x <= u for x in held)) / 6
        expected = (sum(x > u for x in held) + 0.3 * (1 + sum(x == u for x in held))) / 6
        assert p_smoothed(bank(held), u, 0.3) == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 3, 9, 16, 200])
@pytest.mark.parametrize("rho", [0.1, 0.3, 0.4, 0.7])
def test_rates_are_exact_and_bounded_as_promised(n: int, rho: float) -> None:
    """T3 without ties, by counting ranks."""
    budget, coverage = (exact_rate(n, lambda s, u, t=t: fires(Rule(rho, t), s, u)) for t in ("budget", "coverage"))
    assert budget == pytest.approx(math.floor(rho * (n + 1) + 1e-9) / (n + 1))
    assert budget == pytest.approx(Rule(rho).promise(n))
    assert rho - 1e-9 <= coverage <= rho + 1 / (n + 1) + 1e-9
    grid = (np.arange(100 if n < 16 else 5) + 0.5) / (100 if n < 16 else 5)
    smooth = np.mean([exact_rate(n, lambda s, u, v=v: fires(Rule(rho, "smoothed"), s, u, v)) for v in grid])
    assert smooth == pytest.approx(rho, abs=0.01)


def test_ties_as_the_specification_measured_them() -> None:
    """Normal scores rounded to integers, n = 16, rho = 0.4; the last is the released rule."""
    values = np.arange(-8, 9)
    mass = stats.norm.cdf(values + 0.5) - stats.norm.cdf(values - 0.5)
    rng = np.random.default_rng(0)
    shares = dict.fromkeys(("budget", "coverage", "smoothed", "official"), 0.0)
    draws = 6000
    for _ in range(draws):
        held, u, v = (
            rng.choice(values, 16, p=mass / mass.sum()),
            float(rng.choice(values, p=mass / mass.sum())),
            rng.random(),
        )
        for tail in ("budget", "coverage", "smoothed"):
            shares[tail] += fires(Rule(0.4, tail), held, u, v) / draws  # type: ignore[arg-type]
        chunk = Chunk(Key("run", "q", 0, 0, "score"), Cell("q", "", 0), u)
        shares["official"] += (OfficialPolicy(bank(held)).decide(chunk, v).action != "accept") / draws
    assert shares["budget"] < 0.4 < shares["coverage"]  # T3: the bounds hold with ties, however far they are off
    for name, expected in {"budget": 0.220, "coverage": 0.619, "smoothed": 0.400, "official": 0.264}.items():
        assert abs(shares[name] - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5


def official(threshold: float) -> Any:
    def decide(scores: Any, u: float) -> bool:
        chunk = Chunk(Key("run", "q", 0, 0, "score"), Cell("q", "", 0), u)
        return OfficialPolicy(bank(scores), threshold=threshold).decide(chunk, 0.5).action != "accept"

    return decide


def test_the_released_rule_keeps_neither_bound() -> None:
    assert exact_rate(16, official(0.6)) == pytest.approx(7 / 17)
    assert exact_rate(16, official(0.75)) == pytest.approx(5 / 17)
    assert exact_rate(7, official(0.6)) == pytest.approx(3 / 8)


def test_t1_fresh_banks_are_super_uniform() -> None:
    rng = np.random.default_rng(1)
    counts = {"budget": 0, "smoothed": 0}
    for _ in range(20_000):
        p = rank(Bank(rng.normal(size=16)), rng.normal(), rng.random(), guaranteed=True, why="")
        for tail in ("budget", "smoothed"):
            counts[tail] += Rule(0.4, tail).label(p) != "accept"  # type: ignore[arg-type]
    assert 6837 <= counts["budget"] <= 7282
    assert 7772 <= counts["smoothed"] <= 8228


def test_t2_one_bank_gives_beta_binomial_counts() -> None:
    rng, n, tests = np.random.default_rng(2), 200, 2000
    k = Rule(0.4).takeovers(n)
    assert beta_binomial(tests, k, n + 1 - k) == pytest.approx(
        stats.betabinom.pmf(range(tests + 1), tests, k, n + 1 - k)
    )
    outside = 0
    for _ in range(50):
        held = np.sort(rng.normal(size=n))
        cut, _ = Rule(0.4).cut_points(bank(held))
        count = int((rng.normal(size=tests) > cut).sum())
        assert 540 <= count <= 1070
        outside += not 719 <= count <= 882
    assert outside > 3  # the plain binomial range must not be used


@pytest.mark.parametrize("tail", ["budget", "coverage"])
def test_cut_points_are_where_labels_change(tail: Any) -> None:
    for n, rho in itertools.product((2, 5, 16), (0.1, 0.4, 0.9)):
        held, rule = np.arange(1.0, n + 1), Rule(rho, tail, rho / 2)
        takeover, discard = rule.cut_points(bank(held))
        for u in np.arange(0.0, n + 2, 0.5):
            label = rule.label(rank(bank(held), u, 0.5, guaranteed=True, why=""))
            over = (lambda c, u=u: u > c) if tail == "budget" else (lambda c, u=u: u >= c)
            assert label == ("discard" if over(discard) else "takeover" if over(takeover) else "accept")


@pytest.mark.parametrize("tail", ["budget", "coverage"])
def test_the_prediction_set_is_what_lies_beyond_the_cut(tail: Any) -> None:
    held, rule = bank(range(9)), Rule(0.4, tail, 0.1)
    cut, _ = rule.cut_points(held)
    scores = np.arange(9.5, -1.0, -0.5)
    beyond = scores > cut if tail == "budget" else scores >= cut
    assert rule.prediction_set(held, scores.tolist()) == np.flatnonzero(beyond).tolist()
    assert 0 < beyond.sum() < len(scores)


def test_the_smoothed_rule_has_no_cut_and_sets_what_no_draw_keeps() -> None:
    rule = Rule(0.4, "smoothed")
    with pytest.raises(ValueError, match="no cut points"):
        rule.cut_points(bank(range(9)))
    scores = [7.0, 6.0, 5.5, 5.0]
    sure = [i for i, u in enumerate(scores) if p_smoothed(bank(range(9)), u, 1.0) <= 0.4]
    assert rule.prediction_set(bank(range(9)), scores) == sure == [0, 1, 2]


def clustered(rng: Any, questions: int, chains: int) -> tuple[Any, list[str]]:
    """Scores 63 % of whose variance is between questions."""
    means = rng.normal(size=questions) * 0.63**0.5
    scores = means[:, None] + rng.normal(size=(questions, chains)) * 0.37**0.5
    return scores.ravel(), [str(q) for q in range(questions) for _ in range(chains)]


def test_t4_pooled_scores_of_few_questions_promise_too_much_and_hierarchical_ones_do_not() -> None:
    rng, draws = np.random.default_rng(4), 7_000
    pooled = hierarchical = 0
    for _ in range(draws):
        scores, groups = clustered(rng, 5, 16)
        held, u = Bank(scores, tuple(groups)), float(clustered(rng, 1, 1)[0][0])
        pooled += p_low(held, u) <= 0.1
        hierarchical += ClusteredBank(held).rank(u, 0.5, guaranteed=True, why="").low <= 0.1
    assert pooled / draws > 0.12  # 0.130 in the specification
    assert hierarchical / draws <= 0.1
    draws = 4000
    rates = []
    for _ in range(draws):
        scores, groups = clustered(rng, 20, 16)
        u = float(clustered(rng, 1, 1)[0][0])
        rates.append(ClusteredBank(Bank(scores, tuple(groups))).rank(u, 0.5, guaranteed=True, why="").low <= 0.3)
    assert 0.1 < np.mean(rates) <= 0.3 + 4 * (0.21 / draws) ** 0.5


def test_t5_scores_that_move_with_the_turn_need_banks_of_their_own() -> None:
    rng, n, rho = np.random.default_rng(5), 2000, 0.1
    means, deviations = (0.486, 0.411, 0.461, 0.496), (0.149, 0.290, 0.213, 0.214)
    scores = [
        (float(x), Cell(str(i), "", t)) for t in range(4) for i, x in enumerate(rng.normal(means[t], deviations[t], n))
    ]
    first, turns = fit("pooled", scores), fit("per_turn", scores, buckets=(0, 1, 2, 3))
    rule = Rule(rho)

    def rate(calibrator: Any, turn: int) -> float:
        new = rng.normal(means[turn], deviations[turn], 4000)
        ps = [calibrator.p_value(float(u), Cell("new", "", turn), 0.5) for u in new]
        return float(np.mean([rule.label(p) != "accept" for p in ps]))

    assert rate(first, 1) > 0.14
    for turn in range(4):
        assert abs(rate(turns, turn) - rho) < 4 * (rho * (1 - rho) * (1 / n + 1 / 4000)) ** 0.5
        assert turns.p_value(0.5, Cell("new", "", turn), 0.5).guaranteed == (turn < 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("chains", [1, 4, 16])
def test_the_rate_of_all_decisions_is_kept_where_some_questions_chains_last_longer(chains: int, sign: int) -> None:
    """How many of a question's chains get to turn 1 goes with their scores; 16 are judged, whatever calibrated."""
    rng, rho, questions = np.random.default_rng(7), 0.2, 30
    taken, decided = Counter[str](), 0

    def scores(launched: int) -> Any:
        mean = rng.normal()
        return sign * mean + 0.3 * rng.normal(size=rng.binomial(launched, 1 / (1 + np.exp(-2 * mean))))

    for _ in range(300):
        held = [(float(u), Cell(f"q{i}", "", 1)) for i in range(questions) for u in scores(chains)]
        turns = fit("per_turn", held, buckets=range(3), chains=chains)
        ps = [turns.p_value(u, Cell("new", "", 1), 0.5) for _ in range(4) for u in scores(16)]
        decided += len(ps)
        for p in ps:
            assert p is not None
            assert p.guaranteed
            taken["budget"] += Rule(rho).label(p) != "accept"
            taken["coverage"] += Rule(rho, "coverage").label(p) != "accept"
    assert taken["budget"] / decided < rho + 0.01  # each question counting alike: .27 to .32, or .04
    assert rho - 0.01 < taken["coverage"] / decided < rho + 0.08


@pytest.mark.parametrize(("n", "rho", "shared"), [(9, 0.3, 0.3 + 0.7 / 8), (19, 0.4, 0.4 + 0.6 / 13)])
def test_chains_judged_by_banks_that_hold_them_break_the_promise(n: int, rho: float, shared: float) -> None:
    """Turn-1 scores shifted far up by a takeover at turn 0; banks of turn 1 from disjoint chains are exact."""
    rng, draws, rule = np.random.default_rng(6), 4000, Rule(rho)
    counts = {"shared": 0, "disjoint": 0}
    for _ in range(draws):
        first = rng.normal(size=n)
        cut = np.sort(first)[n - rule.takeovers(n)]
        u = rng.normal() + 1e6 * (rng.normal() > cut)
        others = rng.normal(size=n)
        for name, judged in (("shared", first), ("disjoint", others)):
            held = rng.normal(size=n) + 1e6 * (judged > cut)
            counts[name] += fires(rule, held, u)
    noise = 4 * (rho * (1 - rho) / draws) ** 0.5
    assert abs(counts["disjoint"] / draws - rho) < noise
    assert abs(counts["shared"] / draws - shared) < 2 * noise
    assert counts["shared"] / draws > rho + noise


def test_t6_smoothed_p_values_of_a_growing_bank_are_independent_and_uniform() -> None:
    rng, calibrator, ps = np.random.default_rng(7), Online(update="stream"), []
    for i, u in enumerate(rng.normal(size=3000)):
        p = calibrator.p_value(float(u), Cell(str(i), "", 0), float(rng.random()))
        calibrator.observe(float(u), Cell(str(i), "", 0), False)
        if p is not None:
            ps.append(p.smoothed)
    assert stats.kstest(ps, "uniform").pvalue > 1e-3
    centred = np.asarray(ps) - 0.5
    assert abs((centred[1:] * centred[:-1]).mean() / centred.var()) < 3 / len(ps) ** 0.5
    assert stats.binomtest(int((np.asarray(ps) <= 0.2).sum()), len(ps), 0.2).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["worse and worse", "always worst", "always best", "alternating", "against it"])
def test_t7_the_adaptive_rate_is_kept_for_any_sequence(kind: str) -> None:
    step, rho, n = 0.05, 0.3, 2000
    calibrator = Adaptive(Pooled(bank(np.arange(50.0))), step=step)
    policy, taken = ConformalPolicy(calibrator, Rule(rho, "budget", 0.2), resamples=0), 0
    scores = {"worse and worse": range(n), "always worst": [1e9] * n, "alternating": [-1.0, 99.0] * (n // 2)}.get(
        kind, [-1.0] * n
    )
    for i, u in enumerate(scores):
        if kind == "against it":  # best while it takes over too seldom, worst while too often
            u = 1e9 if taken > rho * i else -1.0
        chunk = Chunk(Key("run", str(i), 0, 0, "score"), Cell(str(i), "", 0), float(u))
        decision = policy.decide(chunk, 0.5)
        policy.observe(chunk, decision)
        taken += decision.action != "accept"
    assert abs(taken / n - rho) <= (max(rho, 1 - rho) + step) / (step * n) + 1e-9


def test_online_banks_warm_up_by_first_chunks_alone_and_epochs_wait() -> None:
    policy = ConformalPolicy(Online(update="stream", n_min=3), Rule(0.4), on_cold="accept")
    for i in range(5):
        for turn, attempt in ((0, 0), (1, 0), (0, 1)):
            chunk = Chunk(Key("run", str(i), 0, turn, "score", attempt), Cell(str(i), "", turn), float(i))
            policy.observe(chunk, policy.decide(chunk, 0.5))
    assert policy.calibrator.bank.size == 5  # type: ignore[attr-defined]
    epoch = Online(update="epoch")
    epoch.observe(1.0, Cell("a", "", 0), False)
    assert epoch.p_value(1.0, Cell("b", "", 0), 0.5) is None
    epoch.advance()
    assert epoch.p_value(1.0, Cell("b", "", 0), 0.5).n == 1  # type: ignore[union-attr]
    window = Online(update="window", window=2)
    for i in range(4):
        window.observe(float(i), Cell("a", "", 0), False)
    assert window.bank.scores.tolist() == [2.0, 3.0]


def test_shared_banks_say_what_they_promise() -> None:
    banks = {turn: Bank(np.arange(9.0), tuple("abcdefghi")) for turn in (0, 1, 2, 8)}
    turns = PerTurn(banks)
    told = {turn: turns.p_value(1.5, Cell("q", "", turn), 0.5) for turn in (0, 1, 2, 3, 5, 8, 20)}
    assert [turn for turn, p in told.items() if p is not None and p.guaranteed] == [0, 1]
    whys = {turn: p.why for turn, p in told.items() if p is not None}
    assert whys[3].startswith("turns 2 to 3 share a bank")
    assert whys[5] == "too few scores of this turn: ranked among those of turn 2"
    assert whys[20].startswith("turns from 8 on share a bank")
    pooled = Pooled(banks[0]).p_value(1.5, Cell("a", "", 0), 0.5)
    assert pooled is not None
    assert (pooled.guaranteed, pooled.why.endswith("if those of the bank are asked alike")) == (True, True)


def test_banks_are_known_by_their_content_and_hashed_when_asked() -> None:
    one = Bank(np.array([2.0, 1.0, 1.0, 0.0]), ("a", "c", "b", "d"))
    assert "version" not in vars(one)
    assert one.version == Bank(np.array([-0.0, 1.0, 1.0, 2.0]), ("d", "b", "c", "a")).version
    others = [
        Bank(np.array([2.0, 1.0, 1.0, 0.0]), ("a", "b", "b", "d")),
        Bank(np.array([2.0, 1.0, 1.0, 1e-300]), ("a", "b", "c", "d")),
        Bank(np.array([2.0, 1.0, 1.0, 0.0])),
        one.add([1.0], ["b"]),
        Bank(np.array([1.0, 2.0]), ("ab", "c")),
        Bank(np.array([1.0, 2.0]), ("a", "bc")),
    ]
    assert len({bank.version for bank in (one, *others)}) == 7


@pytest.mark.parametrize("tail", ["budget", "coverage", "smoothed"])
def test_decisions_that_hang_by_a_hair_are_marked(tail: Any) -> None:
    policy = ConformalPolicy(Pooled(bank(np.arange(9.0))), Rule(0.4, tail))

    def near(u: float) -> bool:
        return policy.decide(Chunk(Key("run", "q", 0, 0, "score"), Cell("q", "", 0), u), 0.5).near_tie

    cut = 5.0 if tail == "budget" else {"coverage": 5.0, "smoothed": 5.0}[tail]
    assert [near(cut + step) for step in (-2e-6, -5e-7, 5e-7, 2e-6)] == [False, True, True, False]
    assert not near(3.0)


def test_backing_off_makes_no_promise() -> None:
    turns = PerTurn({0: bank([1.0, 2.0]), 1: bank([5.0])}, base="pooled", n_min=2)
    p = turns.p_value(1.5, Cell("q", "", 1), 0.5)
    assert p is not None
    assert (p.n, p.guaranteed) == (2, False)
    assert "turn 0" in p.why


def test_a_rate_below_the_resolution_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"below 1 / \(n \+ 1\).*0.0909"):
        ConformalPolicy(Pooled(bank(range(10))), Rule(0.05))
    assert attainable_rates(3) == [0, 0.25, 0.5, 0.75, 1]
    assert Budget(4, 16).takeover_rate == 0.25
    assert Rule(0.4).takeover_count(16, 16)[0] == pytest.approx(16 * 6 / 17)
    assert Rule(0.4, "smoothed").takeover_count(16, 16)[0] == pytest.approx(6.4)
    assert Rule(0.5, "coverage").prediction_set(bank(range(9)), [0.0, 8.5, 4.5]) == [1, 2]


def test_policies_do_what_their_papers_say() -> None:
    def chunk(score: float | None, number: int = 0, attempt: int = 0) -> Chunk:
        return Chunk(
            Key("run", "q", number, 0, "score", attempt), Cell("q", "", 0), score, "" if score is not None else "short"
        )

    ranked = RankPolicy(2).decide_all([chunk(s, i) for i, s in enumerate((1.0, None, 5.0, 3.0))], [0.5] * 4)
    assert [d.action for d in ranked] == ["accept", "accept", "continue", "continue"]
    assert [SpecReasonPolicy(7).decide(chunk(-g), 0.5).action for g in (6.9, 7.0)] == ["replace", "accept"]
    assert [RSDPolicy(0.7).decide(chunk(-r), 0.1).action for r in (0.5, 0.7)] == ["replace", "accept"]
    soft = RSDPolicy(0.7, soft=True)
    assert [soft.decide(chunk(-0.5), v).action for v in (0.4, 0.6)] == ["accept", "replace"]
    again = ConformalPolicy(Hierarchical(Bank(np.arange(9.0), tuple("abcdefghi"))), Rule(0.4), "resample", resamples=1)
    assert again.decide(chunk(99.0), 0.5).action == "resample"
    last = again.decide(chunk(99.0, attempt=1), 0.5)
    assert (last.action, last.reason, last.guaranteed) == ("accept", "resampled", False)
    assert again.decide(chunk(None), 0.5).reason == "short"
    with pytest.raises(ValueError, match="bank must hold"):
        OfficialPolicy(bank([]))
