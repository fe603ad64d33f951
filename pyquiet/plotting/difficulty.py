"""The figure of a `DifficultyTable`: what thoughts gain, from the easiest tokens to the hardest."""

import os
from typing import TYPE_CHECKING

from pyquiet.evaluation.difficulty import DifficultyTable
from pyquiet.plotting.figures import check_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_gain_by_decile(
    table: DifficultyTable, path: str | os.PathLike[str], *, difficulty: str = "base entropy", title: str | None = None
) -> None:
    """Draws the gain of each bin as a bar with its standard error, the base NLL as a line, to a PNG, SVG or PDF file.

    Args:
        difficulty: what the tokens are ranked by, for the axis.

    Raises:
        ValueError: another ending of the file's name. OSError: it cannot be written.
        ImportError: matplotlib is missing (`pip install 'pyquiet[plot]'`).
    """
    check_figure(path)
    save_figure(draw_gain_by_decile(table, difficulty=difficulty, title=title), path)


def draw_gain_by_decile(
    table: DifficultyTable, *, difficulty: str = "base entropy", title: str | None = None
) -> "Figure":
    """The figure of `plot_gain_by_decile`."""
    from matplotlib.figure import Figure

    place = range(1, len(table.count) + 1)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    gain = figure.subplots()
    gain.bar(place, table.gain.tolist(), yerr=table.gain_error.tolist(), capsize=3, color="tab:blue", label="gain")
    gain.axhline(0, color="black", linewidth=0.8)
    ends = zip(table.low.tolist(), table.high.tolist(), strict=True)
    gain.set_xticks(place, [f"{i}\n{low:.2f}\nto {high:.2f}" for i, (low, high) in zip(place, ends, strict=True)])
    gain.set_xlabel(f"tokens by {difficulty} (nats), the easiest first")
    gain.set_ylabel("gain by thinking (nats a token)")
    loss = gain.twinx()
    loss.plot(place, table.base_nll.tolist(), color="tab:orange", marker="o", label="base NLL (right)")
    loss.set_ylim(bottom=0)
    loss.set_ylabel("base NLL (nats a token)")
    handles = [*gain.get_legend_handles_labels()[0], *loss.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower right", ncols=2)
    figure.suptitle(title or f"{int(table.count.sum())} tokens")
    return figure
