"""All five systems at work on the embedded models, each beside its plain alternative."""

from pyquiet.demo.scene import Scene
from pyquiet.demo.scenes import FIGURES, SCENES, play

__all__ = ["FIGURES", "SCENES", "Scene", "play"]
