"""Who may import whom: cli -> systems -> kernels -> csrc, and no system another, not even through a third module."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pyquiet"
NATIVE = PACKAGE.with_name("csrc")
SYSTEMS = ("quiet_star", "any_subset", "diffusion", "scaling", "bilevel")
ABOVE = ("pyquiet", "cli", "demo", "plotting", "testing", "__main__")  # of the systems
SERVING = ("evaluation", "kernels", "prompts", "zoo")  # a system may use what does not lead it to another

pytestmark = pytest.mark.skipif(not PACKAGE.is_dir(), reason=f"needs the sources, {PACKAGE}")


@cache
def modules() -> dict[str, Path]:
    """All modules by name, such as pyquiet.kernels.registration; a package's own file by the package's name."""
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.glob("*.pyi")]
    names = (".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files)
    return dict(zip((name.removesuffix(".__init__") for name in names), files, strict=True))


@cache
def imports(name: str) -> dict[str, str]:
    """What a module imports, wherever in it: names, and the modules of ours that they come from."""
    found = {}
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}, line {node.lineno}: a relative import; give the module's whole name"
            found |= {alias.asname or alias.name: origin(str(node.module), alias.name) for alias in node.names}
    return {alias: module for alias, module in found.items() if module in modules() and alias != "__version__"}


def origin(module: str, name: str) -> str:
    """The module that a name comes from, behind packages that only gather names; the package for one of its own."""
    if f"{module}.{name}" in modules():
        return f"{module}.{name}"
    is_package = module in modules() and modules()[module].name == "__init__.py"
    return imports(module).get(name, module) if is_package else module


def reached(name: str) -> set[str]:
    """What a module leads to, itself included."""
    seen, waiting = set(), [name]
    while waiting:
        if (here := waiting.pop()) not in seen:
            seen.add(here)
            waiting += imports(here).values()
    return seen


def room(name: str) -> str:
    """The folder of a module, or the module itself where it lies right in pyquiet/."""
    return name.split(".")[1] if "." in name else name


def strays(rooms: tuple[str, ...], forbidden: set[str]) -> set[tuple[str, str]]:
    """Modules of these rooms, each with one of the forbidden rooms that it leads to."""
    mine = [name for name in modules() if room(name) in rooms]
    return {(name, other) for name in mine for other in reached(name) if room(other) in forbidden}


def test_every_folder_has_its_place():
    folders = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert folders == {*SYSTEMS, *ABOVE, *SERVING} - {"pyquiet", "__main__"}, "say above what a new folder may lead to"


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_leads_to_no_other(system):
    assert not strays((system,), {*SYSTEMS, *ABOVE} - {system})


def test_kernels_and_what_lies_below_lead_to_no_system():
    files = {file.stem for file in PACKAGE.glob("*.py*")} - {"__init__", "__main__"}
    assert {"randomness", "native", "checks"} <= files
    assert not strays(("kernels", "prompts", *files), {*SYSTEMS, *ABOVE, "evaluation"})


def test_only_kernels_and_random_numbers_open_the_native_door():
    native = {f"pyquiet.{name}" for name in ("native", "_cpu", "_cuda")}
    doors = {room(name) for name in modules() if native & {*imports(name).values()}}
    assert doors == {"kernels", "randomness", "environment", "native"}


def test_nobody_imports_the_command_line():
    named = {(name, other) for name in modules() for other in imports(name).values()}
    assert {name for name, other in named if room(other) == "cli" and room(name) != "cli"} <= {"pyquiet.__main__"}


def test_native_code_knows_no_torch_and_no_kernel_another():
    included = [
        (file.relative_to(NATIVE), header)
        for file in NATIVE.rglob("*.*")
        for header in re.findall(r'^#include [<"](.+)[>"]', file.read_text(encoding="utf-8"), re.M)
    ]
    assert len(included) > 100
    doors = ("binding.hpp", "bindings_cpu.cpp", "bindings_cuda.cpp", "arguments.hpp", "tensor.hpp")
    for file, header in included:
        assert not re.match(r"torch/|ATen/|c10/|Python\.h", header), (file, header)
        assert file.name in doors or not re.match(r"pybind11/|.*(binding|arguments|tensor)\.hpp", header), (
            file,
            header,
        )
        if len(file.parts) > 1:  # a header beside it, or of common/
            assert not re.match(r"\.\./(?!common/)", header), (file, header)
