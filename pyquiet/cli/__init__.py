"""The command `pyquiet`: one module a command, with `add_parser(commands)` and `run(args)`."""

import argparse
import sys
from collections.abc import Sequence

from pyquiet import __version__
from pyquiet.cli import bilevel, demo, diffuse, doctor, evaluate, infill, scale, think, train

COMMANDS = (demo, think, infill, diffuse, scale, bilevel, train, evaluate, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Bad input is one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="pyquiet",
        description="Language models that think before they speak, fill in any order and write in parallel.",
    )
    parser.add_argument("--version", action="version", version=f"pyquiet {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        print(f"pyquiet: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
