"""Masked diffusion whose parallel steps are corrected by an energy (EDLM, arXiv 2410.21357)."""

from pyquiet.diffusion.ar_energy import AREnergy, check_tokenizers
from pyquiet.diffusion.energy import Energy, as_energy
from pyquiet.diffusion.hooks import (
    Context,
    Order,
    Remask,
    ReMDM,
    Tokens,
    by_confidence,
    by_threshold,
    left_to_right_blocks,
    remdm,
)
from pyquiet.diffusion.likelihood import NLL, nll
from pyquiet.diffusion.modeling import Denoiser, MaskedDenoiser, as_denoiser, backbone
from pyquiet.diffusion.nce_energy import NCEEnergy, NCEEnergyConfig
from pyquiet.diffusion.partition import log_z
from pyquiet.diffusion.sampling import Diffusion, diffuse
from pyquiet.diffusion.schedule import Schedule
from pyquiet.diffusion.session import Trace
from pyquiet.lazy import lazily

__all__ = [
    "NLL",
    "AREnergy",
    "Context",
    "Denoiser",
    "Diffusion",
    "DiffusionTrainer",
    "DiffusionTrainingArguments",
    "Energy",
    "MaskedDenoiser",
    "NCEEnergy",
    "NCEEnergyConfig",
    "NCETrainer",
    "NCETrainingArguments",
    "Order",
    "ReMDM",
    "Remask",
    "Schedule",
    "Tokens",
    "Trace",
    "as_denoiser",
    "as_energy",
    "backbone",
    "by_confidence",
    "by_threshold",
    "check_tokenizers",
    "completions",
    "diffuse",
    "left_to_right_blocks",
    "log_z",
    "nce_loss",
    "nelbo",
    "nll",
    "random_masks",
    "remdm",
]

__getattr__ = lazily(
    __name__,
    {
        "DiffusionTrainer": "trainer",
        "DiffusionTrainingArguments": "arguments",
        "NCETrainer": "trainer",
        "NCETrainingArguments": "arguments",
        "completions": "training",
        "nce_loss": "training",
        "nelbo": "training",
        "random_masks": "training",
    },
)
