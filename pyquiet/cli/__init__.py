"""The command `pyquiet`: one module a command, with `add_parser(commands)` and `run(args)`."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence

from transformers.utils import logging

from pyquiet import __version__
from pyquiet.cli import bilevel, demo, diffuse, doctor, evaluate, infill, scale, think, train
from pyquiet.cli.options import Parser, add_commands, stopped

COMMANDS = (demo, think, infill, diffuse, scale, bilevel, train, evaluate, doctor)


def command_line() -> Parser:
    """The parser of `pyquiet` and, below it, those of all commands."""
    parser = Parser(
        prog="pyquiet",
        description="Five ways to get more out of a language model. `pyquiet demo` shows them all.",
    )
    parser.add_argument("--version", action="version", version=f"pyquiet {__version__}")
    commands = add_commands(parser, "commands")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Bad input is one line on stderr and exit code 2, Ctrl-C exit code 130."""
    logging.disable_progress_bar()  # of loading weights
    if argv is None:  # the program, and not somebody who calls it
        warnings.formatwarning = _warning
    args = argparse.Namespace()
    try:
        command_line().parse_args(argv, args)
        code = int(args.run(args))
        print(end="", flush=True)  # who reads may be gone
        return code
    except KeyboardInterrupt:
        return stopped()
    except BrokenPipeError:  # who reads has seen enough; what Python would still write at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        print(f"pyquiet: error: {_in_words(error, args)}", file=sys.stderr)
        return 2


def _warning(message: Warning | str, *where: object, **line: object) -> str:
    return f"pyquiet: warning: {' '.join(str(message).split())}\n"


def _in_words(error: Exception, args: argparse.Namespace) -> str:
    """What is wrong, in a line; an argument that the library names by its option, which has the same name."""
    words = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    named = re.match(r"(\w+)(=| must )", words)
    if named and named[1] in args:
        words = f"--{named[1].replace('_', '-')}{named[2].replace('=', ' ')}{words[named.end() :]}"
    return " ".join(words.split())
