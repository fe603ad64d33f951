"""The kernels: each module holds a public function, its reference in plain torch and its registration."""

from pyquiet.kernels.draft_verification import Verification, verify_draft
from pyquiet.kernels.thought_attention import thought_attention

__all__ = ["Verification", "thought_attention", "verify_draft"]
