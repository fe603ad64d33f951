"""Masked diffusion whose parallel steps are corrected by an energy (EDLM, arXiv 2410.21357)."""

from pyquiet.diffusion.ar_energy import AREnergy, check_tokenizers
from pyquiet.diffusion.energy import Energy, as_energy
from pyquiet.diffusion.modeling import MaskedDenoiser, backbone
from pyquiet.diffusion.nce_energy import NCEEnergy, NCEEnergyConfig
from pyquiet.diffusion.schedule import Schedule

__all__ = [
    "AREnergy",
    "Energy",
    "MaskedDenoiser",
    "NCEEnergy",
    "NCEEnergyConfig",
    "Schedule",
    "as_energy",
    "backbone",
    "check_tokenizers",
]
