"""What you need to test a sampler of your own: models whose law is known, and the test of draws against it."""

from pyquiet.testing.diffusion import enumerate_diffusion, resampled_law
from pyquiet.testing.enumerable import TabularEngine, enumerate_law, tiny_xlnet
from pyquiet.testing.exactness import Exactness, exactness_test, goodness_of_fit, samples_needed

__all__ = [
    "Exactness",
    "TabularEngine",
    "enumerate_diffusion",
    "enumerate_law",
    "exactness_test",
    "goodness_of_fit",
    "resampled_law",
    "samples_needed",
    "tiny_xlnet",
]
