"""What a command found: words for a reader, or JSON with the environment that it came from."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from pyquiet.environment import environment_record
from pyquiet.files import check_target, replacing

STANDARD_OUTPUT = "-"
_BOLD, _PLAIN = "\033[1m", "\033[0m"


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json`, alone or with a file, for `check_json` and `give`."""
    parser.add_argument(
        "--json",
        nargs="?",
        const=STANDARD_OUTPUT,
        metavar="FILE",
        help="print the report as JSON, or write it to FILE; the environment stands in it",
    )
    parser.set_defaults(command=parser.prog)


def check_json(args: argparse.Namespace) -> None:
    """OSError, before any work is done, if the file of --json cannot be written."""
    if args.json not in (None, STANDARD_OUTPUT):
        check_target(args.json)


def told_parts(parts: Iterable[tuple[str, bool]]) -> list[dict[str, Any]]:
    """The parts of a text as a report has them: each with whether it was filled in."""
    return [{"text": part, "filled": filled} for part, filled in parts]


def give(
    args: argparse.Namespace,
    report: Mapping[str, Any],
    words: str,
    models: Mapping[str, nn.Module | None] | None = None,
) -> None:
    """`show` of a report, with the environment and these models described in it."""
    show(args, None if args.json is None else {**report, "environment": environment(args, models)}, words)


def show(args: argparse.Namespace, document: Mapping[str, Any] | None, words: str) -> None:
    """Prints the words, or the document as JSON where `--json` stands alone; with a file it does both."""
    if args.json is not None:
        text = json.dumps(document, indent=2)
        if args.json == STANDARD_OUTPUT:
            words = text
        else:
            with replacing(args.json) as file:
                file.write_text(text + "\n", encoding="utf-8")
    print(words)


def environment(args: argparse.Namespace, models: Mapping[str, nn.Module | None] | None = None) -> dict[str, Any]:
    """`environment_record` of a command whose parser set `command` to its name."""
    arguments = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    return environment_record(args.command, arguments, models)


@contextmanager
def memory_in_words() -> Iterator[None]:
    """A ValueError in place of torch's complaint that memory is full."""
    try:
        yield
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        words = str(error).splitlines()[0]
        raise ValueError(f"memory is full ({words}); give shorter texts or gaps, or fewer at a time") from None


def in_marks(parts: Sequence[tuple[str, bool]]) -> str:
    """The text of such parts: what was filled in is bold on a terminal with colours and in brackets elsewhere.

    Spaces around what was filled in have no mark, and none at the end are shown.
    """
    marks = (_BOLD, _PLAIN) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ("[", "]")
    return "".join(_marked(part, *marks) if is_filled else part for part, is_filled in parts).rstrip()


def _marked(part: str, opened: str, closed: str) -> str:
    words = part.strip()
    before = part[: len(part) - len(part.lstrip())]
    return f"{before}{opened}{words}{closed}{part[len(before) + len(words) :]}"
