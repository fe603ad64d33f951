"""What the documentation says works: its examples run, its commands parse, its links lead somewhere, its pages build.

A block of Python whose first line is `# An excerpt: ...` is not run, one with `# needs pyquiet[EXTRA]` only where that
is installed. Others run as they stand, those of a file one after the other, in an empty folder.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from pyquiet.cli import command_line

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BROUGHT = {"eval": "lm_eval", "plot": "matplotlib", "train": "accelerate", "scale": "httpx", "demo": "sklearn"}
REPOSITORY = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "bench" / "README.md"]
EXAMPLES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in sorted((ROOT / "pyquiet").rglob("*.py"))
    if "\n    >>> " in file.read_text("utf-8")
]


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_run(code: str) -> bool:
    """Whether a block is to be run here."""
    first = code.split("\n", 1)[0]
    needed = re.match(r"# needs pyquiet\[(\w+)\]", first)
    if needed:
        return importlib.util.find_spec(BROUGHT[needed[1]]) is not None
    return not first.startswith("# An excerpt: ")


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text("utf-8"))], ids=by_name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text("utf-8")
    names: dict[str, object] = {"__name__": "example"}
    blocks = [(found[1], text.count("\n", 0, found.start(1))) for found in BLOCK.finditer(text)]
    runnable = [(code, line) for code, line in blocks if is_run(code)]
    if not runnable:
        pytest.skip("its examples are excerpts, or need an extra that is not installed")
    for code, line in runnable:
        exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples_of_docstrings_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


def hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands(text: str) -> list[str]:
    """The command lines of pyquiet in a page: in indented blocks, and with options in the running text."""
    text = text.replace("\\\n", " ")
    lines = [part for line in re.findall(r"^ {4,}(.*)$", text, re.MULTILINE) for part in line.split("&&")]
    inline = [line for line in re.findall(r"`([^`\n]+)`", text) if " --" in line]
    return [line.strip() for line in lines + inline if line.strip().startswith("pyquiet ")]


@pytest.mark.parametrize("page", REPOSITORY, ids=by_name)
def test_commands_are_those_of_the_command_line(page: Path) -> None:
    parser = command_line()
    wrong = []
    for command in commands(page.read_text("utf-8")):
        try:
            parser.parse_args(shlex.split(command, comments=True)[1:])
        except SystemExit:  # from --help
            pass
        except ValueError as error:
            wrong.append((command, str(error)))
    assert not wrong


def test_there_are_examples_and_commands_to_find() -> None:
    code = [found[1] for page in PAGES for found in BLOCK.finditer(page.read_text("utf-8"))]
    assert sum(map(is_run, code)) > 6
    assert not is_run("# An excerpt: x is yours\nx.run()")
    assert len(commands((ROOT / "README.md").read_text("utf-8"))) > 5
    assert commands("    pip install . && pyquiet doctor --json  # all\n\n`pyquiet a --b`") == [
        "pyquiet doctor --json  # all",
        "pyquiet a --b",
    ]


@pytest.mark.parametrize("page", REPOSITORY, ids=by_name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text("utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.slow
def test_the_pages_build_and_hold_all_that_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("material", "mkdocstrings"):
        pytest.importorskip(name)
    config = pytest.importorskip("mkdocs.config").load_config(
        str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True
    )
    monkeypatch.setenv("COLUMNS", "100")  # the hook sets it
    monkeypatch.chdir(ROOT)  # where `watch` and extensions are looked for
    importlib.import_module("mkdocs.commands.build").build(config)  # a warning is an error
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        text = (tmp_path / "api" / f"{page.stem}.html").read_text("utf-8")
        package = importlib.import_module(f"pyquiet.{page.stem}")
        documented = [name for name in package.__all__ if hook().home(package, name)]
        missing = [name for name in documented if f'.{name}" class="doc' not in text]
        assert documented
        assert not missing
    assert "--takeover-rate" in (tmp_path / "commands.html").read_text("utf-8")
