"""MkDocs hook: writes out what a package exports, and what the command says of itself."""

import argparse
import importlib
import os
import re
from typing import Any

from pyquiet.cli import command_line


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A line `::: exports of PACKAGE` becomes a `:::` directive for each name; `::: commands` the help of all."""
    markdown = re.sub(r"^::: exports of (\S+)$", lambda found: exports(found[1]), markdown, flags=re.MULTILINE)
    return re.sub(r"^::: commands$", lambda _: commands(), markdown, flags=re.MULTILINE)


def exports(package: str) -> str:
    """Directives for all classes and functions; then, without one, the constants and aliases."""
    module = importlib.import_module(package)
    names = sorted(module.__all__, key=lambda name: home(module, name) is None)
    return "\n\n".join(f"::: {path}" if (path := home(module, name)) else f"`{name}`" for name in names)


def home(module: Any, name: str) -> str | None:
    """The path at which a class or a function is defined."""
    value = getattr(module, name)
    if getattr(value, "__qualname__", None) != name or not value.__module__.startswith("pyquiet."):
        return None
    return f"{value.__module__}.{name}"


def commands() -> str:
    os.environ["COLUMNS"] = "100"  # argparse's width
    return "\n\n".join(f"## {p.prog}\n\n```text\n{p.format_help()}```" for p in parsers(command_line())[1:])


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parser and all that stand below it, in the order of the help."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(deeper for action in below for child in action.choices.values() for deeper in parsers(child))]
