"""What `think`, `infill` and `diffuse` share where they take a file of prompts."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pyquiet
from pyquiet.cli import options
from pyquiet.cli.reports import give

if TYPE_CHECKING:
    from pyquiet.prompts import Prompt
    from pyquiet.prompts.answers import Cost, Row

# Options that do not change what becomes of a prompt; of models and their words, digests count and not names.
_NO_MATTER = {"run", "command", "fields", "prompts", "prompt", "text", "output", "batch_size", "device", "quiet"}
_NO_MATTER |= {"json"}
_NAMES = {"model", "tokenizer", "energy"}


def add_prompts(parser: argparse.ArgumentParser, given: Any, fields: Sequence[str]) -> None:
    """Adds the options of many prompts, `--prompts` to a group that excludes a single one."""
    lines = " or ".join(f'{{"{field}": ...}}' for field in fields)
    given.add_argument("--prompts", metavar="FILE", help=f"many, of JSON lines {lines}, with an id if need be")
    many = parser.add_argument_group("many prompts")
    many.add_argument(
        "--output",
        metavar="FILE",
        help="for the answers, JSON lines in the order of the prompts; a run that was stopped goes on when the command "
        "is given again, and torchrun or accelerate launch spread it over processes",
    )
    options.add_batch_size(many, "prompts", 8)
    options.add_quiet(many)
    parser.set_defaults(fields=tuple(fields))


def check(args: argparse.Namespace) -> None:
    """ValueError or OSError, before anything is read, if the answers to the prompts of a file cannot be written."""
    from pyquiet.files import check_target

    if args.prompts is None:
        options.check_needed(args, "--prompts", "output")
    elif args.output is None:
        raise ValueError("--prompts needs --output, the file for the answers")
    else:
        check_target(args.output)


def read(args: argparse.Namespace) -> "tuple[list[Prompt], str]":
    """The prompts of `--prompts` and their digest; ValueError or OSError if there is something wrong with the file."""
    from pyquiet.prompts import read_prompts

    return read_prompts(args.prompts, args.fields)


def answer(
    args: argparse.Namespace,
    prompts: "tuple[list[Prompt], str]",
    answers: "Callable[[Sequence[Prompt]], tuple[list[list[Row]], Cost]]",
    in_words: "Callable[[Cost], str]",
    *,
    model: Any,
    tokenizer: Any,
    energy: Any = None,
) -> int:
    """Writes what becomes of the prompts to `--output` and prints what that cost, in words or, with --json, as JSON.

    Args:
        prompts: what `read` returned.
        answers: the rows of each of some prompts, and sums of what they cost.
        model, energy: modules, whose weights tell whether a run that goes on is the one that was begun.
    """
    from pyquiet.prompts import answer_prompts, model_digest, tokenizer_digest

    header = {"command": args.command, "pyquiet": pyquiet.__version__}
    header |= {name: value for name, value in vars(args).items() if name not in _NO_MATTER | _NAMES}
    header |= {"prompts": prompts[1], "model": model_digest(model), "tokenizer": tokenizer_digest(tokenizer)}
    if energy is not None:
        header["energy"] = model_digest(energy)

    def named(batch: "Sequence[Prompt]") -> "tuple[list[list[Row]], Cost]":
        rows, cost = answers(batch)
        rows = _rounded(rows)
        names = [{"index": prompt.index, "id": prompt.id} for prompt in batch]
        return [[name | row for row in several] for name, several in zip(names, rows, strict=True)], cost

    many = {"batch_size": args.batch_size, "progress": not args.quiet}
    try:
        cost = answer_prompts(prompts[0], named, args.output, header, **many)
    except KeyboardInterrupt:
        return options.stopped(args.output)
    if cost is not None:
        report = {"output": args.output, "prompts": len(prompts[0]), **cost}
        answered = f"{len(prompts[0])} prompt{'s' if len(prompts[0]) != 1 else ''} answered in {args.output}"
        words = f"{answered}: {in_words(cost)}, all processes together"
        give(args, report, words, {"model": model, "energy": energy})
    return 0


def _rounded(value: Any) -> Any:
    """The value with its floats to four digits, since batches move their last bits; what is infinite or nan is None."""
    if isinstance(value, float):
        return float(f"{value:.4g}") + 0.0 if math.isfinite(value) else None  # + 0.0: there is one zero
    if isinstance(value, dict):
        return {name: _rounded(x) for name, x in value.items()}
    return [_rounded(x) for x in value] if isinstance(value, list | tuple) else value
