"""Masked diffusion whose parallel steps are corrected by an energy (EDLM, arXiv 2410.21357)."""

from pyquiet.diffusion.modeling import MaskedDenoiser, backbone
from pyquiet.diffusion.schedule import Schedule

__all__ = ["MaskedDenoiser", "Schedule", "backbone"]
