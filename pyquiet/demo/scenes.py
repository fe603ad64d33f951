"""The scenes in their order, and the play of some of them."""

import time
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module

from pyquiet.demo.scene import Scene

SCENES = ("thoughts", "infilling", "diffusion", "scaling", "bilevel")
FIGURES = ("thoughts", "scaling", "bilevel")  # those that matplotlib draws for a page


def play(names: Iterable[str] = SCENES, *, seed: int = 0, progress: bool = True) -> Iterator[tuple[str, Scene, float]]:
    """Each scene's name, what it found and the seconds it took, one after the other and none twice.

    Raises:
        ValueError: there is no such scene, known before the first is played.
    """
    wanted = list(dict.fromkeys(names))
    if unknown := [name for name in wanted if name not in SCENES]:
        raise ValueError(f"names: there is no scene {unknown[0]!r}; there are {', '.join(SCENES)}")
    return _play(wanted, seed, progress)


def _play(names: list[str], seed: int, progress: bool) -> Iterator[tuple[str, Scene, float]]:
    for name in names:
        show: Callable[[int, bool], Scene] = import_module(f"pyquiet.demo.{name}").show
        began = time.perf_counter()
        scene = show(seed, progress)
        yield name, scene, time.perf_counter() - began
