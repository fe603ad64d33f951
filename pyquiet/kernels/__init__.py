"""The kernels: each module holds a public function, its reference in plain torch and its registration."""

from pyquiet.kernels.draft_verification import Verification, verify_draft
from pyquiet.kernels.importance_resampling import (
    Candidates,
    Resampled,
    draw_candidates,
    draw_candidates_from_hidden,
    ess,
    resample,
)
from pyquiet.kernels.thought_attention import thought_attention

__all__ = [
    "Candidates",
    "Resampled",
    "Verification",
    "draw_candidates",
    "draw_candidates_from_hidden",
    "ess",
    "resample",
    "thought_attention",
    "verify_draft",
]
