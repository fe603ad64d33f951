"""The modules of recipes: scripts that import each other by bare names, some of which several recipes have."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@contextmanager
def modules(*folders: str) -> Iterator[SimpleNamespace]:
    """All modules of a recipe by name, behind those of folders that come later; none is left when the block ends."""
    if not RECIPES.is_dir():
        pytest.skip(f"no recipes in {RECIPES}")
    with pytest.MonkeyPatch.context() as patch:
        for folder in reversed(folders):
            patch.syspath_prepend(RECIPES / folder)
        _forget()
        names = [file.stem for file in sorted((RECIPES / folders[0]).glob("*.py"))]
        try:
            yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
        finally:
            _forget()


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(RECIPES):
            del sys.modules[name]
