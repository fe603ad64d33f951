"""Figures, and pages for the browser."""

from pyquiet.plotting.difficulty import plot_gain_by_decile
from pyquiet.plotting.diffusion import plot_diffusion
from pyquiet.plotting.figures import as_svg, check_figure
from pyquiet.plotting.film import film_view
from pyquiet.plotting.infilling import infilling_view
from pyquiet.plotting.page import Section, View, write_page
from pyquiet.plotting.thoughts import thoughts_view, write_thoughts_page

__all__ = [
    "Section",
    "View",
    "as_svg",
    "check_figure",
    "film_view",
    "infilling_view",
    "plot_diffusion",
    "plot_gain_by_decile",
    "thoughts_view",
    "write_page",
    "write_thoughts_page",
]
