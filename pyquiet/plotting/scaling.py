"""The figure of a run of test-time scaling: takeovers by turn beside what was promised, and slots over time."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pyquiet.plotting.figures import check_figure, save_figure
from pyquiet.scaling.records import Record
from pyquiet.scaling.report import Report
from pyquiet.scaling.slots import POOLS, slots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_run(report: Report, records: Iterable[Record], path: str | os.PathLike[str]) -> None:
    """Draws the rate of takeovers by turn with its 95 % interval and the promised band, and who held which slot when.

    Raises:
        ValueError: another ending than .png, .svg or .pdf. OSError: the file cannot be written.
        ImportError: matplotlib is missing (`pip install 'pyquiet[plot]'`).
    """
    check_figure(path)
    save_figure(draw_run(report, records), path)


def draw_run(report: Report, records: Iterable[Record]) -> "Figure":
    """The figure of `plot_run`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    rates, times = figure.subplots(1, 2)
    for turn, row in report.turns.items():
        value, low, high = row.rate.value, row.rate.low, row.rate.high
        if value is not None and low is not None and high is not None:
            label = "observed, 95 % of bootstrapped questions" if turn == min(report.turns) else None
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            rates.errorbar(turn, value, error, fmt="o", color="tab:blue", label=label)
        if row.band is not None and row.judged:
            band = row.band[0] / row.judged, row.band[1] / row.judged
            label = "promised, 5 to 95 %" if turn == min(report.turns) else None
            rates.fill_between([turn - 0.3, turn + 0.3], *band, color="tab:green", alpha=0.3, label=label)
    rates.set(xlabel="turn", ylabel="share of drafts taken over", ylim=(0, 1))
    rates.legend()
    first = 0
    for pool, held in slots(records).items():
        bars = [(row.start, row.end - row.start, first + row.slot) for row in held]
        for slot in {y for _, _, y in bars}:
            spans = [(start, length) for start, length, y in bars if y == slot]
            times.broken_barh(spans, (slot - 0.4, 0.8), color=f"C{POOLS.index(pool)}")
        times.plot([], color=f"C{POOLS.index(pool)}", label=pool, linewidth=6)
        first += 1 + max((row.slot for row in held), default=-1)
    times.set(xlabel="seconds", ylabel="slot")
    times.legend()
    return figure
