"""The figure of a run of test-time scaling shows what the report says."""

import pytest

from pyquiet.plotting import draw_p_values, draw_slots, draw_takeovers, plot_run
from pyquiet.scaling import ATTS, Plan, Sampling
from pyquiet.scaling.slots import slots

QUESTIONS = ["Ann has 3 eggs. Ann buys 4. How many eggs are there?", "Ben has 9 eggs. Ben sells 4. How many are left?"]


@pytest.fixture(scope="module")
def run():
    plan = Plan(chains=3, turns=3, draft=Sampling(32), target=Sampling(32), stop=("\n",), seed=1)
    records = []
    atts = ATTS("tiny-draft", "tiny-target", takeover_rate=0.5, plan=plan, on_takeover="replace")
    return atts.run(QUESTIONS, engine="sync", on_record=records.append).report, records


def test_a_band_is_called_promised_only_where_it_is(run):
    report, _ = run
    rates = draw_takeovers(report)
    bands = [x for x in rates.collections if x.get_label() in ("promised, 5 to 95 %", "aimed at, no promise")]
    turns = {turn: row for turn, row in report.turns.items() if row.band is not None and row.judged}
    assert len(bands) == len(turns) > 1
    for band, row in zip(bands, turns.values(), strict=True):
        low, high = band.get_paths()[0].get_extents().intervaly
        assert (low, high) == pytest.approx((row.band[0] / row.judged, row.band[1] / row.judged))
        assert (band.get_label() == "promised, 5 to 95 %") == (row.guaranteed == row.judged)
    assert len({band.get_label() for band in bands}) == 2  # its own first chunks make a bank for the first turn alone


def test_laws_of_p_values_stand_beside_the_uniform_one(run):
    report, records = run
    laws = draw_p_values(iter(records))
    uniform, *turns = laws.lines
    assert uniform.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert [line.get_label() for line in turns] == [f"turn {turn}" for turn, row in report.turns.items() if row.judged]
    for turn, line in zip(report.turns, turns, strict=True):
        ps = [r.decision.p for r in records if r.decision and r.decision.p and r.key.turn == turn and not r.key.attempt]
        assert (line.get_xdata()[1:-1] == sorted(ps)).all()
        assert line.get_ydata().tolist() == [*(i / len(ps) for i in range(len(ps) + 1)), 1]


def test_slots_and_legends(run):
    report, records = run
    rates, times = draw_takeovers(report), draw_slots(iter(records))
    held = slots(records)
    assert len(times.collections) == sum(len({row.slot for row in rows}) for rows in held.values())
    for axes, most in ((rates, 3), (times, 3)):
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert len(labels) == len(set(labels)) <= most


def test_it_is_written_to_a_file(run, tmp_path):
    plot_run(*run, tmp_path / "run.svg")
    assert "<svg" in (tmp_path / "run.svg").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="gif"):
        plot_run(*run, tmp_path / "run.gif")
