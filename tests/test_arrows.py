"""Who may import whom: cli -> systems -> kernels -> csrc, and no system another, not even through a third module."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyquiet"
SYSTEMS = ("quiet_star", "any_subset", "diffusion", "scaling", "bilevel")
ABOVE = ("__main__", "cli", "demo", "plotting", "testing")  # of the systems

pytestmark = pytest.mark.skipif(not PACKAGE.is_dir(), reason=f"needs the sources, {PACKAGE}")


@cache
def modules() -> dict[str, Path]:
    """All modules by name, such as kernels.registration; a package's own file is called by the package's name."""
    files = PACKAGE.rglob("*.py")
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


@cache
def imported(name: str) -> frozenset[str]:
    """The modules of ours that a module names in its imports, wherever these stand."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {word.removeprefix("pyquiet.") for word in found if word.startswith("pyquiet.")}
    return frozenset(ours & modules().keys())


def reached(name: str) -> set[str]:
    """What a module leads to, itself included; a package leads on to nothing, as its file only gathers names."""
    seen, waiting = set(), [name]
    while waiting:
        if (here := waiting.pop()) not in seen:
            seen.add(here)
            waiting += imported(here) if modules()[here].name != "__init__.py" else []
    return seen


def room(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_leads_to_no_other(system):
    mine = [name for name in modules() if room(name) == system]
    assert len(mine) > 5
    led = {(name, other) for name in mine for other in reached(name) if room(other) in {*SYSTEMS, *ABOVE} - {system}}
    assert not led


def test_kernels_and_what_lies_below_lead_to_no_system():
    below = [
        name for name in modules() if room(name) == "kernels" or ("." not in name and name not in (*SYSTEMS, *ABOVE))
    ]
    below = [name for name in below if modules()[name].name != "__init__.py"]
    assert {"randomness", "native", "checks", "kernels.thought_attention"} <= set(below)
    assert not {(name, other) for name in below for other in reached(name) if room(other) in (*SYSTEMS, *ABOVE)}


def test_only_kernels_and_random_numbers_open_the_native_door():
    doors = {room(name) for name in modules() if {"native", "_cpu", "_cuda"} & {room(x) for x in imported(name)}}
    assert doors <= {"kernels", "randomness", "environment", "cli", "native"}


def test_nobody_imports_the_command_line():
    assert {room(name) for name in modules() if any(room(x) == "cli" for x in imported(name))} == {"__main__", "cli"}
