"""The figure of a `DiffusionTable`: quality and entropy against what they take, and the effective sample size."""

import os
from typing import TYPE_CHECKING

from pyquiet.checks import check_word
from pyquiet.evaluation.diffusion import QUALITIES, DiffusionTable
from pyquiet.plotting.figures import check_figure, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COSTS = {
    "steps": "steps",
    "denoiser_calls": "denoiser calls",
    "passes": "denoiser calls + energy passes",
    "seconds": "seconds a text",
}
_WORDS = {
    "perplexity": "generative perplexity",
    "ngram_nll": "n-gram NLL (nats a symbol)",
    **{f"variation_{n}": f"total variation of {n}-grams" for n in (1, 2, 3)},
    "entropy_bits": "entropy of a text (bits)",
}


def plot_diffusion(
    table: DiffusionTable, path: str | os.PathLike[str], *, quality: str = "perplexity", title: str | None = None
) -> None:
    """Draws a quality, and the entropy under it, against steps, calls, passes and seconds, to a PNG, SVG or PDF file.

    The held-out text is a dashed line. On the right: the mean effective sample size of each step of the runs with the
    most steps, as time goes from noise (1) to text (0).

    Args:
        quality: one of `pyquiet.evaluation.diffusion.QUALITIES`; lower is better.

    Raises:
        ValueError: no such quality; another ending of the file's name. OSError: it cannot be written.
        ImportError: matplotlib is missing (`pip install "pyquiet[plot]"`).
    """
    check_figure(path)
    check_word("quality", quality, QUALITIES)
    texts = len(table.rows[0].values["perplexity"])
    figure = new_figure((17, 7), title or f"{texts} texts of {table.length} tokens")
    grid = figure.add_gridspec(2, len(_COSTS) + 1)
    for line, name in enumerate((quality, "entropy_bits")):
        first = figure.add_subplot(grid[line, 0])
        first.set_ylabel(_WORDS[name])
        for column, cost in enumerate(_COSTS):
            axes = figure.add_subplot(grid[line, column], sharey=first) if column else first
            _draw_quality(axes, table, name, cost)
    _draw_ess(figure.add_subplot(grid[:, -1]), table)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save_figure(figure, path)


def _draw_quality(axes: "Axes", table: DiffusionTable, name: str, cost: str) -> None:
    for method, rows in table.methods().items():
        found = [row.estimates() for row in rows]
        x = [float(row.steps or 0) if cost == "steps" else e[cost].mean for row, e in zip(rows, found, strict=True)]
        y = [e[name] for e in found]
        axes.errorbar(x, [e.mean for e in y], yerr=[e.error for e in y], marker="o", capsize=3, label=method)
    text = table.rows[0].estimates()[name]
    axes.axhline(text.mean, color="black", linestyle="--", linewidth=0.8, label="held-out text")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.set_xlabel(_COSTS[cost])


def _draw_ess(axes: "Axes", table: DiffusionTable) -> None:
    for i, rows in enumerate(table.methods().values()):
        trace = rows[-1].trace
        if len(trace):
            axes.plot(trace[:, 0].tolist(), trace[:, 1].tolist(), color=f"C{i}")
    axes.set(xlim=(1, 0), xlabel="time, from noise to text", ylabel="effective sample size")
