"""The figure of a `DiffusionTable`: quality and entropy against what they take, and the effective sample size."""

import os
from typing import Any

from pyquiet.evaluation.diffusion import QUALITIES, DiffusionTable
from pyquiet.plotting.figures import check_figure, save_figure

_AXES = {
    "steps": "steps",
    "denoiser_calls": "denoiser calls",
    "passes": "denoiser calls + energy passes",
    "seconds": "seconds a text",
}
_WORDS = {
    "perplexity": "generative perplexity",
    "ngram_nll": "n-gram NLL (nats a symbol)",
    **{f"variation_{n}": f"total variation of {n}-grams" for n in (1, 2, 3)},
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
        ImportError: matplotlib is missing (`pip install 'pyquiet[plot]'`).
    """
    check_figure(path)
    if quality not in QUALITIES:
        raise ValueError(f"quality must be one of {', '.join(QUALITIES)}, got {quality!r}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 7), layout="constrained")
    grid = figure.add_gridspec(2, len(_AXES) + 1)
    text = table.rows[0].estimates()
    for line, name in enumerate((quality, "entropy_bits")):
        first = None
        for column, (cost, words) in enumerate(_AXES.items()):
            axes = figure.add_subplot(grid[line, column], sharey=first)
            first = first or axes
            for method, rows in table.methods().items():
                found = [row.estimates() for row in rows]
                x = [
                    float(row.steps or 0) if cost == "steps" else e[cost].mean
                    for row, e in zip(rows, found, strict=True)
                ]
                y = [e[name] for e in found]
                axes.errorbar(x, [e.mean for e in y], yerr=[e.error for e in y], marker="o", capsize=3, label=method)
            axes.axhline(text[name].mean, color="black", linestyle="--", linewidth=0.8, label="held-out text")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
            axes.set_xlabel(words)
            if column == 0:
                axes.set_ylabel(_WORDS.get(name, "entropy of a text (bits)"))
    _draw_ess(figure.add_subplot(grid[:, -1]), table)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(title or f"{len(table.rows[0].values['perplexity'])} texts of {table.length} tokens")
    save_figure(figure, path)


def _draw_ess(axes: Any, table: DiffusionTable) -> None:
    for i, rows in enumerate(table.methods().values()):
        trace = rows[-1].trace
        if len(trace):
            axes.plot(trace[:, 0].tolist(), trace[:, 1].tolist(), color=f"C{i}")
    axes.set_xlim(1, 0)
    axes.set_xlabel("time, from noise to text")
    axes.set_ylabel("effective sample size")
