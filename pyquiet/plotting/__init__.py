"""Figures, and pages for the browser."""

from pyquiet.files import check_target
from pyquiet.plotting.difficulty import plot_gain_by_decile
from pyquiet.plotting.diffusion import plot_diffusion
from pyquiet.plotting.figures import check_figure
from pyquiet.plotting.html import write_thoughts_page

__all__ = ["check_figure", "check_target", "plot_diffusion", "plot_gain_by_decile", "write_thoughts_page"]
