"""Figures as files and as parts of a page; matplotlib is imported where one is drawn."""

import importlib.util
import io
import os
from typing import TYPE_CHECKING

from pyquiet.files import check_target, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


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
        raise ImportError("figures need matplotlib: pip install 'pyquiet[plot]'")


def save_figure(figure: "Figure", path: str | os.PathLike[str]) -> None:
    """Writes the figure in the format that the path's ending names, whole or not at all."""
    with replacing(path) as partial:
        figure.savefig(partial, format=os.path.splitext(path)[1][1:].lower(), dpi=150)


def as_svg(figure: "Figure") -> str:
    """The figure as an <svg> element, the same for the same figure; its text is drawn, so that no font is needed."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "pyquiet"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
