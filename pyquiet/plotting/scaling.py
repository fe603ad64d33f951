"""The figures of a run of test-time scaling: takeovers beside what was promised, p-values, and slots over time."""

import os
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from pyquiet.plotting.figures import save_panels, these_or_new
from pyquiet.scaling.records import Record
from pyquiet.scaling.report import Report
from pyquiet.scaling.slots import POOLS, slots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OBSERVED = "observed, 95 % interval"
_PROMISED = "promised, 5 to 95 %"
_AIMED_AT = "aimed at, no promise"
_UNIFORM = "of scores like the bank's"
_POOLS = dict(zip(POOLS, ("draft writes", "target scores", "target writes"), strict=True))
_TURNS = 7  # whose p-values are drawn


def plot_run(report: Report, records: Iterable[Record], path: str | os.PathLike[str]) -> None:
    """Draws `draw_takeovers`, `draw_p_values` and `draw_slots` side by side, to a file.

    Raises:
        ValueError: another ending than .png, .svg or .pdf. OSError: the file cannot be written.
        ImportError: matplotlib is missing (`pip install "pyquiet[plot]"`).
    """
    kept = list(records)
    save_panels(path, (partial(draw_takeovers, report), partial(draw_p_values, kept), partial(draw_slots, kept)))


def draw_takeovers(report: Report, axes: "Axes | None" = None) -> "Axes":
    """Draws the rate of takeovers by turn, its 95 % interval and the promised band; on a new figure's axes where there
    are none."""
    axes = these_or_new(axes)
    for turn, row in report.turns.items():
        value, low, high = row.rate.value, row.rate.low, row.rate.high
        if value is not None and low is not None and high is not None:
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar(turn, value, error, fmt="o", color="tab:blue", label=_OBSERVED)
        if row.band is not None and row.judged:
            band = row.band[0] / row.judged, row.band[1] / row.judged
            promised = row.guaranteed == row.judged
            colour, label = ("tab:green", _PROMISED) if promised else ("tab:gray", _AIMED_AT)
            axes.fill_between([turn - 0.3, turn + 0.3], *band, color=colour, alpha=0.3, label=label)
    axes.set(xlabel="turn", ylabel="share of drafts taken over", ylim=(0, 1.02), xticks=list(report.turns))
    _legend(axes)
    return axes


def draw_p_values(records: Iterable[Record], axes: "Axes | None" = None) -> "Axes":
    """Draws the law of each turn's p-values beside the uniform one; on a new figure's axes where there are none.

    Scores like those of the bank have p-values below x in a share of about x.
    """
    axes = these_or_new(axes)
    turns: dict[int, list[float]] = {}
    for record in records:
        key, decision = record.key, record.decision
        if key.phase == "run" and not key.attempt and decision is not None and decision.p is not None:
            turns.setdefault(key.turn, []).append(decision.p)
    axes.plot((0, 1), (0, 1), color="tab:gray", linestyle="--", label=_UNIFORM)
    for turn, ps in sorted(turns.items())[:_TURNS]:
        shares = [i / len(ps) for i in range(len(ps) + 1)]
        axes.step([0, *sorted(ps), 1], [*shares, 1], where="post", label=f"turn {turn}")
    axes.set(xlabel="p-value that decided", ylabel="share of drafts at most there", xlim=(0, 1), ylim=(0, 1))
    _legend(axes)
    return axes


def draw_slots(records: Iterable[Record], axes: "Axes | None" = None) -> "Axes":
    """Draws which slot was held when, pool above pool; on a new figure's axes where there are none."""
    axes = these_or_new(axes)
    first = 0
    for pool, held in slots(records).items():
        for number in sorted({row.slot for row in held}):
            spans = [(row.start, row.end - row.start) for row in held if row.slot == number]
            axes.broken_barh(spans, (first + number - 0.4, 0.8), color=f"C{POOLS.index(pool)}", label=_POOLS[pool])
        first += 1 + max((row.slot for row in held), default=-1)
    axes.set(xlabel="seconds", ylabel="slot (a request at a time)")
    _legend(axes)
    return axes


def _legend(axes: "Axes") -> None:
    """Each label once, above the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(list(once.values()), list(once), loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize="small")
