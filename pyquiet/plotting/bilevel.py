"""The figure of hyper-cleaning: its curves, and what the rows came to count."""

import os
from typing import TYPE_CHECKING

from torch import Tensor

from pyquiet.bilevel.logistic import Cleaned
from pyquiet.plotting.figures import check_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_cleaning(
    found: Cleaned, path: str | os.PathLike[str], *, wrong: Tensor | None = None, title: str | None = None
) -> None:
    """Draws the validation loss and the hypergradient's norm by step, and histograms of the weights, to a file.

    Args:
        wrong: bool [n], rows whose labels are known to be wrong; their weights are drawn apart.

    Raises:
        ValueError: another ending than .png, .svg or .pdf. OSError: the file cannot be written.
        ImportError: matplotlib is missing (`pip install 'pyquiet[plot]'`).
    """
    check_figure(path)
    save_figure(draw_cleaning(found, wrong=wrong, title=title), path)


def draw_cleaning(found: Cleaned, *, wrong: Tensor | None = None, title: str | None = None) -> "Figure":
    """The figure of `plot_cleaning`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.5), layout="constrained")
    loss, norm, weights = figure.subplots(1, 3)
    loss.plot(found.steps, found.loss)
    loss.set(xlabel="step", ylabel="validation loss (nats)", ylim=(0, None))
    norm.semilogy(found.steps, found.hypergradient)
    norm.set(xlabel="step", ylabel="norm of the tracked hypergradient")
    groups = [found.weights] if wrong is None else [found.weights[~wrong], found.weights[wrong]]
    labels = ["all rows"] if wrong is None else ["right labels", "wrong labels"]
    weights.hist([group.tolist() for group in groups], bins=20, range=(0, 1), label=labels)
    weights.set(xlabel="weight", ylabel="rows")
    weights.legend()
    if title:
        figure.suptitle(title)
    return figure
