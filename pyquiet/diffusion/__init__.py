"""Masked diffusion whose parallel steps are corrected by an energy (EDLM, arXiv 2410.21357)."""

from importlib import import_module
from typing import Any

from pyquiet.diffusion.ar_energy import AREnergy, check_tokenizers
from pyquiet.diffusion.energy import Energy, as_energy
from pyquiet.diffusion.likelihood import NLL, nll
from pyquiet.diffusion.modeling import MaskedDenoiser, backbone
from pyquiet.diffusion.nce_energy import NCEEnergy, NCEEnergyConfig
from pyquiet.diffusion.partition import log_z
from pyquiet.diffusion.sampling import Diffusion, diffuse
from pyquiet.diffusion.schedule import Schedule

__all__ = [
    "NLL",
    "AREnergy",
    "Diffusion",
    "DiffusionTrainer",
    "DiffusionTrainingArguments",
    "Energy",
    "MaskedDenoiser",
    "NCEEnergy",
    "NCEEnergyConfig",
    "NCETrainer",
    "NCETrainingArguments",
    "Schedule",
    "as_energy",
    "backbone",
    "check_tokenizers",
    "diffuse",
    "log_z",
    "nce_loss",
    "nelbo",
    "nll",
    "random_masks",
]

_TRAINING = {
    "DiffusionTrainer": "trainer",
    "DiffusionTrainingArguments": "arguments",
    "NCETrainer": "trainer",
    "NCETrainingArguments": "arguments",
    "nce_loss": "training",
    "nelbo": "training",
    "random_masks": "training",
}


def __getattr__(name: str) -> Any:
    """What training needs, imported when it is asked for: transformers' Trainer brings accelerate and more along."""
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_TRAINING[name]}"), name)
