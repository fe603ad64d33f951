"""What the package imports is what it requires: always, or by an extra that the error of who misses it names."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "pyproject.toml"
BROUGHT = {
    "huggingface_hub",
    "numpy",
    "safetensors",
    "tokenizers",
    "tqdm",
}  # by transformers, whose requirements they are
FOR_DEVELOPERS = {"docs", "test"}

pytestmark = pytest.mark.skipif(not PROJECT.is_file(), reason=f"needs the sources, {PROJECT}")


def required() -> dict[str, set[str]]:
    """What each extra requires, "" what is always required, by the names of modules."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    return {extra: {module(re.match(r"[\w.-]+", word)[0]) for word in words} for extra, words in lists.items()}


def module(distribution: str) -> str:
    return {"scikit-learn": "sklearn"}.get(distribution, distribution.replace("-", "_"))


def sources() -> list[str]:
    return [file.read_text(encoding="utf-8") for file in (ROOT / "pyquiet").rglob("*.py")]


def imported() -> set[str]:
    """The packages that ours imports, wherever in it, without the standard library."""
    nodes = [node for text in sources() for node in ast.walk(ast.parse(text))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"pyquiet"}


def test_all_that_is_imported_is_required_and_nothing_else():
    of_users = {name for extra, names in required().items() if extra not in FOR_DEVELOPERS for name in names}
    elsewhere = {"accelerate", "math_verify"}  # by transformers' Trainer; by a program of a process of its own
    assert of_users | BROUGHT == imported() | elsewhere


def test_errors_name_extras_that_there_are():
    named = {extra for text in sources() for extra in re.findall(r"pyquiet\[(\w+)\]", text)}
    assert named == required().keys() - FOR_DEVELOPERS - {""}


def test_the_tests_have_what_users_may_have():
    """But lm-evaluation-harness, which is large; CI installs it besides."""
    extras = required()
    of_users = set().union(*(names for extra, names in extras.items() if extra not in FOR_DEVELOPERS | {""}))
    assert of_users - {"lm_eval"} <= extras["test"]
