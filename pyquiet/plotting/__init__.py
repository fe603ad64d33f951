"""Figures, and pages for the browser.

`draw_*` draws on the axes that it is given, or on those of a new figure, and returns them; `plot_*` writes a file;
`*_view` makes a part of a page, and `write_*page` the page.
"""

from pyquiet.plotting.bilevel import draw_hypergradient, draw_loss, draw_weights, plot_cleaning
from pyquiet.plotting.difficulty import draw_gain_by_decile, plot_gain_by_decile
from pyquiet.plotting.diffusion import plot_diffusion
from pyquiet.plotting.figures import as_svg, check_figure
from pyquiet.plotting.film import film_view
from pyquiet.plotting.infilling import infilling_view
from pyquiet.plotting.page import Section, View, write_page
from pyquiet.plotting.scaling import draw_p_values, draw_slots, draw_takeovers, plot_run
from pyquiet.plotting.thoughts import thoughts_view, write_thoughts_page

__all__ = [
    "Section",
    "View",
    "as_svg",
    "check_figure",
    "draw_gain_by_decile",
    "draw_hypergradient",
    "draw_loss",
    "draw_p_values",
    "draw_slots",
    "draw_takeovers",
    "draw_weights",
    "film_view",
    "infilling_view",
    "plot_cleaning",
    "plot_diffusion",
    "plot_gain_by_decile",
    "plot_run",
    "thoughts_view",
    "write_page",
    "write_thoughts_page",
]
