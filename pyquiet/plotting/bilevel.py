"""The figures of hyper-cleaning: its curves, and what the rows came to count."""

import os
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from pyquiet.bilevel.logistic import Cleaned
from pyquiet.plotting.figures import save_panels, these_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_cleaning(
    found: Cleaned, path: str | os.PathLike[str], *, wrong: Tensor | None = None, title: str | None = None
) -> None:
    """Draws `draw_loss`, `draw_hypergradient` and `draw_weights` side by side, to a file.

    Args:
        wrong: bool [n], rows whose labels are known to be wrong; their weights are drawn apart.

    Raises:
        ValueError: another ending than .png, .svg or .pdf. OSError: the file cannot be written.
        ImportError: matplotlib is missing (`pip install "pyquiet[plot]"`).
    """
    draws = (partial(draw_loss, found), partial(draw_hypergradient, found), partial(draw_weights, found, wrong=wrong))
    save_panels(path, draws, title)


def draw_loss(found: Cleaned, axes: "Axes | None" = None) -> "Axes":
    """Draws the loss on the validation rows, in nats, by step; on axes of a new figure where there are none."""
    axes = these_or_new(axes)
    axes.plot(found.steps, found.loss)
    axes.set(xlabel="step", ylabel="validation loss (nats)", ylim=(0, None))
    return axes


def draw_hypergradient(found: Cleaned, axes: "Axes | None" = None) -> "Axes":
    """Draws the norm of the hypergradient as the method tracks it, by step; on a new figure's axes where there are
    none."""
    axes = these_or_new(axes)
    axes.semilogy(found.steps, found.hypergradient)
    axes.set(xlabel="step", ylabel="norm of the tracked hypergradient")
    return axes


def draw_weights(found: Cleaned, axes: "Axes | None" = None, *, wrong: Tensor | None = None) -> "Axes":
    """Draws a histogram of what rows came to count; on axes of a new figure where there are none.

    Args:
        wrong: bool [n], rows whose labels are known to be wrong; they are drawn apart.
    """
    axes = these_or_new(axes)
    groups = [found.weights] if wrong is None else [found.weights[~wrong], found.weights[wrong]]
    labels = ["all rows"] if wrong is None else ["right labels", "wrong labels"]
    axes.hist([group.tolist() for group in groups], bins=20, range=(0, 1), label=labels)
    axes.set(xlabel="weight", ylabel="rows")
    axes.legend()
    return axes
