"""A watch on p-values: false alarms by their law, against p-values that share a bank too, and drift that is noticed."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pyquiet.scaling.calibration import PerTurn
from pyquiet.scaling.cells import Cell
from pyquiet.scaling.conformal import Bank, Rule, rank
from pyquiet.scaling.drift import DriftMonitor
from pyquiet.scaling.learning import Online
from pyquiet.scaling.policy import Chunk, ConformalPolicy
from pyquiet.scaling.records import Key

LEVEL = 0.1


def alarms(watch: Callable[[DriftMonitor, np.random.Generator], None], runs: int = 150) -> float:
    """The share of runs in which a monitor warns."""
    rng, count = np.random.default_rng(8), 0
    for _ in range(runs):
        monitor = DriftMonitor(LEVEL)
        watch(monitor, rng)
        count += bool(monitor.alarms)
    return count / runs


def in_one_bank(shift: float = 0.0, tests: int = 250, *, independent: bool = False) -> Callable[..., None]:
    """Watches scores, moved by `shift`, in a bank of 15."""

    def watch(monitor: DriftMonitor, rng: np.random.Generator) -> None:
        held = Bank(rng.normal(size=15))
        for u, v in zip(rng.normal(size=tests) + shift, rng.random(tests), strict=True):
            p = rank(held, u, v, guaranteed=True, why="").smoothed
            monitor.see(p, n=0 if independent else held.size, bank="one")

    return watch


def test_uniform_p_values_hardly_ever_alarm_and_others_do() -> None:
    def see(power: float) -> Callable[..., None]:
        return lambda monitor, rng: [monitor.see(float(p)) for p in rng.random(300) ** power]

    assert alarms(see(1.0)) <= LEVEL
    assert alarms(see(3.0), 20) == alarms(see(1 / 3), 20) == 1.0
    monitor = DriftMonitor(0.05)
    see(3.0)(monitor, np.random.default_rng(0))
    (alarm,) = monitor.alarms.values()
    assert alarm.e_value >= 2 / 0.05  # as soon as the game of the first turn has won so much
    assert alarm.seen < monitor.seen[0] == 300
    assert "drifted" in str(alarm)
    again = monitor.fresh()
    assert (again.level, again.alarms, again.log_capital()) == (0.05, {}, 0.0)


def test_p_values_that_share_a_bank_alarm_no_more_often_and_drift_is_still_seen() -> None:
    assert alarms(in_one_bank(independent=True)) > 2 * LEVEL  # taken as independent they break the level
    assert alarms(in_one_bank()) <= LEVEL
    assert alarms(in_one_bank(shift=2.5), 20) > 0.9
    assert alarms(in_one_bank(shift=-2.5), 20) > 0.9


def test_ranks_among_bank_and_forerunners_are_independent_and_uniform() -> None:
    rng, ranks = np.random.default_rng(9), []
    for bank in range(60):
        monitor, held = DriftMonitor(1e-9), Bank(rng.normal(size=4).round(1))  # ties too
        for u, v in zip(rng.normal(size=50).round(1), rng.random(50), strict=True):
            ranks.append(monitor._rank(rank(held, u, v, guaranteed=True, why="").smoothed, 4, str(bank)))
    assert stats.kstest(ranks, "uniform").pvalue > 1e-3
    centred = np.asarray(ranks) - 0.5
    assert abs((centred[1:] * centred[:-1]).mean() / centred.var()) < 3 / len(ranks) ** 0.5


def test_turns_have_games_of_their_own_and_share_the_level() -> None:
    monitor = DriftMonitor(0.5)
    monitor.see(0.5, turn=0)
    assert monitor.see(0.004, turn=1) is None
    assert np.log(2 / 0.5) < monitor.log_capital(1) < np.log(6 / 0.5)
    assert monitor.log_capital(0) < 0
    assert monitor.see(1e-9, turn=1) == monitor.alarms[1]
    assert monitor.see(1e-9, turn=1) is None  # one alarm a turn
    assert monitor.see(1e-9, turn=0) == monitor.alarms[0]


def test_a_policy_shows_what_is_promised_of_first_chains_and_warns() -> None:
    monitor = DriftMonitor(0.5)
    banks = {turn: Bank(np.arange(9.0) + turn, tuple("abcdefghi")) for turn in (0, 1, 2)}
    policy = ConformalPolicy(PerTurn(banks), Rule(0.4), drift=monitor)
    cells = [Cell(f"q{i // 3}", "", i // 3 % 3) for i in range(90)]
    chunks = [Chunk(Key("run", cell.question, i % 3, cell.turn, "score"), cell, 99.0) for i, cell in enumerate(cells)]
    decisions = policy.decide_all(chunks, [0.5] * 90)
    assert not monitor.seen  # deciding is not yet committing
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for chunk, decision in zip(chunks, decisions, strict=True):
            policy.observe(chunk, decision)
    assert [str(warning.message) for warning in told] == [str(alarm) for alarm in monitor.alarms.values()]
    assert monitor.seen == {0: 10, 1: 10}  # of 30 first chains those at turns 0 and 1, which have banks of their own
    assert monitor.log_capital(0) == pytest.approx(monitor.log_capital(1))
    assert monitor.log_capital(2) == 0


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("update", ["stream", "epoch"])
def test_drift_freezes_a_bank_that_grows(freeze: bool, update: Any) -> None:
    bank = Online(Bank(np.arange(9.0)), update=update)
    policy = ConformalPolicy(bank, Rule(0.4), drift=DriftMonitor(0.5, freeze=freeze))
    taken = 0
    for i in range(30):
        cell = Cell(f"q{i}", "", i % 2)
        chunk = Chunk(Key("run", cell.question, 0, cell.turn, "score"), cell, 99.0 + i)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            policy.observe(chunk, policy.decide(chunk, 0.5))
        policy.advance()
        taken += policy.drift.alarms == {}  # type: ignore[union-attr]
    assert policy.drift.seen == {0: 15}  # type: ignore[union-attr]  # first turns alone
    assert 0 < taken < 30
    assert bank.bank.size == 9 + (-(-taken // 2) if freeze else 15)
