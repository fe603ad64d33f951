"""The options that several commands have: each has its name, its words and its check here, and is the same everywhere.

Bad input is told in one line, `pyquiet: error: --option must be ..., got ...`, before anything is loaded.
"""

import argparse
import math
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Whole:
    """The type of an option that is a whole number of at least `least` and below `below`."""

    least: int = 1
    below: float = math.inf
    metavar: ClassVar[str] = "N"

    def __call__(self, word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {word!r}") from None
        if not self.least <= value < self.below:
            bounds = f"at least {self.least}" if self.below == math.inf else f"in [{self.least}, {self.below})"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {value}")
        return value


@dataclass(frozen=True)
class Number:
    """The type of an option that is a finite number from `least` to `most`.

    `open`: it is above `least`. `below`: it is below `most`.
    """

    least: float = -math.inf
    most: float = math.inf
    open: bool = False
    below: bool = False
    metavar: ClassVar[str] = "X"

    def __call__(self, word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {word!r}") from None
        outside = not self.least <= value <= self.most  # nan, too
        if outside or math.isinf(value) or (self.open and value == self.least) or (self.below and value == self.most):
            raise argparse.ArgumentTypeError(f"must be {self}, got {word}")
        return value

    def __str__(self) -> str:
        if self.most < math.inf:
            return f"in {'(' if self.open else '['}{self.least:g}, {self.most:g}{')' if self.below else ']'}"
        return f"{'above' if self.open else 'at least'} {self.least:g}" if self.least > -math.inf else "finite"


@dataclass(frozen=True)
class Temperature(Number):
    """The type of a temperature, whose range is that of `pyquiet.randomness`."""

    least: float = 0
    most: float = 1e37

    def __call__(self, word: str) -> float:
        value = super().__call__(word)
        if 0 < value < 1e-37:
            raise argparse.ArgumentTypeError(f"must be {self}, got {word}")
        return value

    def __str__(self) -> str:
        return "0 (greedy) or in [1e-37, 1e37]"


class _Help(argparse.HelpFormatter):
    """Ends the help of an option with its default, unless the words name one; the type knows the metavar."""

    def _get_help_string(self, action: argparse.Action) -> str:
        words, default = action.help or "", action.default
        if default is None or default is False or default in (argparse.SUPPRESS, []) or "(default" in words:
            return words
        shown = default if isinstance(default, list | tuple) else [default]
        return f"{words} (default: {' '.join(f'{x:g}' if isinstance(x, float) else str(x) for x in shown)})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "NAME" if action.type is str else str(getattr(action.type, "metavar", action.dest.upper()))


class Parser(argparse.ArgumentParser):
    """A parser whose `error` is a ValueError of one line, as everything is that is wrong with the input."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Help} | options)

    def error(self, message: str) -> NoReturn:
        words = message.removeprefix("argument ").replace(": must ", " must ", 1)
        if choice := re.fullmatch(r"(.*): invalid choice: (.*) \(choose from (.*)\)", words):
            option, value, choices = choice.groups()
            words = f"{option} must be one of {choices.replace(chr(39), '')}, got {value}"
        raise ValueError(words if message.startswith("argument ") else f"{words}; see {self.prog} --help")


def add_commands(parser: argparse.ArgumentParser, title: str) -> "argparse._SubParsersAction[Any]":
    """Adds commands, as the title calls them, to one that alone shows its help."""

    def show(args: argparse.Namespace) -> int:
        parser.print_help()
        return 0

    parser.set_defaults(run=show)
    return parser.add_subparsers(title=title, metavar=title.upper().removesuffix("S"))


def add_seed(parser: Any, what: str) -> None:
    parser.add_argument("--seed", type=Whole(-(2**63), 2**64), default=0, help=f"same seed, same {what}")


def add_temperature(parser: Any, default: float, what: str, prefix: str = "") -> None:
    """Adds `--temperature`, or with a prefix that of something else than the answer."""
    words = f"of {what}; 0 takes the likeliest token"
    parser.add_argument(f"--{prefix}temperature", type=Temperature(), default=default, help=words)


def add_top(parser: Any, prefix: str = "") -> None:
    """Adds `--top-k` and `--top-p`."""
    words = "draw from the N likeliest tokens (default: all)"
    parser.add_argument(f"--{prefix}top-k", type=Whole(), help=words)
    words = "draw from the likeliest tokens that have this probability together (default: all)"
    parser.add_argument(f"--{prefix}top-p", type=Number(0, 1, open=True), help=words)


def add_max_new_tokens(parser: Any, default: int) -> None:
    parser.add_argument("--max-new-tokens", type=Whole(), default=default, help="tokens to write at most")


def add_thoughts_per_token(parser: Any) -> None:
    parser.add_argument("--thoughts-per-token", type=Whole(), help="thoughts to average (default: the model's)")


def add_tokenizer(parser: Any) -> None:
    parser.add_argument("--tokenizer", metavar="DIR", help="folder or embedded model's name (default: the model's)")


def add_place(parser: Any) -> None:
    """Adds `--device` and `--dtype`, for `usable_device` and `dtype`."""
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where to run, as torch names it")
    words = "to compute in; with float64 no batch size changes a draw (default: that of the weights)"
    parser.add_argument("--dtype", choices=DTYPES, help=words)


def add_batch_size(parser: Any, what: str, default: int) -> None:
    parser.add_argument("--batch-size", type=Whole(), default=default, help=f"{what} at a time")


def add_quiet(parser: Any) -> None:
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def usable_device(name: str) -> "torch.device":
    """The device of that name, once something could be put on it; else ValueError.

    Of several processes, as torchrun starts them, each has a "cuda" of its own.
    """
    import torch

    from pyquiet.prompts import Ranks

    try:
        return torch.empty(1, device=Ranks.current().device(name)).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; --device cpu is always there") from None


def dtype(args: argparse.Namespace) -> "torch.dtype | None":
    """What the models are to compute in; None leaves them as they are."""
    import torch

    return None if args.dtype is None else getattr(torch, args.dtype)


def given_text(option: str, text: str | None, example: str) -> str:
    """What the option gives, or else standard input or, on a terminal, the example; ValueError if it is no text."""
    from pyquiet.checks import check_text

    if text is not None:
        return check_text(option, text)
    if sys.stdin is None:
        raise ValueError(f"{option} is not given, and standard input is closed: give one of them")
    if sys.stdin.isatty():
        print(f"{option} is not given; an example:", file=sys.stderr)
        return example
    try:
        return check_text("standard input", sys.stdin.read().rstrip("\n"))
    except UnicodeDecodeError:
        raise ValueError("standard input: not UTF-8 text") from None


def stopped(place: str | None = None) -> int:
    """Tells that Ctrl-C ended the command, and from which file it goes on; returns the exit code."""
    goes_on = "" if place is None else f"; the same command goes on from {place}"
    print(f"pyquiet: stopped{goes_on}", file=sys.stderr)
    return 130


def check_needed(args: argparse.Namespace, other: str, *names: str) -> None:
    """ValueError for the first of these options that is given, which have no use without the other."""
    for name in names:
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} has no use without {other}: give both or none")
