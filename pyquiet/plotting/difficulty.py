"""The figure of a `DifficultyTable`: what thoughts gain, from the easiest tokens to the hardest."""

import os
from typing import TYPE_CHECKING

from pyquiet.evaluation.difficulty import DifficultyTable
from pyquiet.plotting.figures import check_figure, new_figure, save_figure, these_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_gain_by_decile(
    table: DifficultyTable, path: str | os.PathLike[str], *, difficulty: str = "base entropy", title: str | None = None
) -> None:
    """Draws the table as `draw_gain_by_decile` does, to a PNG, SVG or PDF file.

    Raises:
        ValueError: another ending of the file's name. OSError: it cannot be written.
        ImportError: matplotlib is missing (`pip install "pyquiet[plot]"`).
    """
    check_figure(path)
    figure = new_figure((8, 4.5))
    draw_gain_by_decile(table, figure.subplots(), difficulty=difficulty, title=title)
    save_figure(figure, path)


def draw_gain_by_decile(
    table: DifficultyTable, axes: "Axes | None" = None, *, difficulty: str = "base entropy", title: str | None = None
) -> "Axes":
    """Draws the gain of each bin as a bar with its standard error, the base NLL as a line.

    Args:
        axes: None draws on those of a new figure.
        difficulty: what the tokens are ranked by, for the axis, whose ticks tell each bin's greatest.
        title: None says how many tokens there are.
    """
    axes = these_or_new(axes)
    place = range(1, len(table.count) + 1)
    axes.bar(place, table.gain.tolist(), yerr=table.gain_error.tolist(), capsize=3, color="tab:blue", label="gain")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(place, [f"{i}\n{high:.2f}" for i, high in zip(place, table.high.tolist(), strict=True)])
    axes.tick_params("x", labelsize="small")
    words = f"tokens, the easiest first, and their greatest {difficulty} (nats)"
    axes.set(xlabel=words, ylabel="gain by thinking (nats a token)")
    loss = axes.twinx()
    loss.plot(place, table.base_nll.tolist(), color="tab:orange", marker="o", label="base NLL (right)")
    loss.set(ylim=(0, None), ylabel="base NLL (nats a token)")
    handles = [*axes.get_legend_handles_labels()[0], *loss.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize="small")
    axes.figure.suptitle(title or f"{int(table.count.sum())} tokens")
    return axes
