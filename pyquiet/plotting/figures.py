"""Figures as files and as parts of a page; matplotlib is imported where one is drawn."""

import importlib.util
import io
import os
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, cast

from pyquiet.files import check_target, replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_PANEL = (5.2, 3.9)  # inches: two stand side by side on a page


def check_figure(path: str | os.PathLike[str]) -> None:
    """Raises what drawing to that path would, before there is anything to draw.

    Raises:
        ValueError: another ending than .png, .svg or .pdf. OSError: the file cannot be written.
        ImportError: matplotlib is missing.
    """
    if check_target(path).suffix.lower() not in FORMATS:
        raise ValueError(f"figure {os.fspath(path)}: its name must end in one of {', '.join(FORMATS)}")
    check_matplotlib()


def check_matplotlib() -> None:
    """Raises ImportError where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('figures need matplotlib: pip install "pyquiet[plot]"')


def these_or_new(axes: "Axes | None") -> "Axes":
    """The axes, or those of a new figure where there are none.

    Raises:
        ImportError: matplotlib is missing.
    """
    return new_figure(_PANEL).subplots() if axes is None else axes


def new_figure(size: tuple[float, float], title: str | None = None) -> "Figure":
    """A figure that no window shows, of that size in inches.

    Raises:
        ImportError: matplotlib is missing.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title)
    return figure


def save_panels(
    path: str | os.PathLike[str], draws: Sequence[Callable[["Axes"], Any]], title: str | None = None
) -> None:
    """`save_figure` of what these functions draw side by side; raises as `check_figure`."""
    check_figure(path)
    figure = new_figure((_PANEL[0] * len(draws), _PANEL[1]), title)
    for draw, axes in zip(draws, figure.subplots(1, len(draws), squeeze=False)[0], strict=True):
        draw(axes)
    save_figure(figure, path)


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Writes the figure in the format that the path's ending names, whole or not at all."""
    with replacing(path) as partial:
        figure.savefig(partial, format=os.path.splitext(path)[1][1:].lower(), dpi=150)


def as_svg(drawn: "Figure | Axes", label: str = "") -> str:
    """A figure, or that of some axes, as an <svg> element, the same for the same figure; its text is drawn, so that no
    font is needed.

    Args:
        label: what is read to those who cannot see it.
    """
    import matplotlib

    text, figure = io.StringIO(), cast("Figure", drawn.figure)
    with matplotlib.rc_context({"svg.hashsalt": "pyquiet"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    spoken = f'<svg role="img" aria-label="{escape(label)}"' if label else "<svg"
    return spoken + svg[svg.index("<svg") + len("<svg") :]
