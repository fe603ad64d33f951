"""`pyquiet evaluate infilling`: what filling in gives and takes, how well stories and code are filled."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from pyquiet.any_subset.sampling import FIXED_METHODS, METHODS
from pyquiet.cli.diffuse import load_causal
from pyquiet.cli.infill import add_law, add_model, cost_in_words, law, load_filler, memory_in_words
from pyquiet.cli.reports import add_json, check_json, give
from pyquiet.cli.think import usable_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Found = tuple[dict[str, Any], str, dict[str, Any]]  # a report, the same in words, and the models it is about


def add_parser(measures: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = measures.add_parser(
        "infilling",
        help="text that is filled in: its quality and what it takes",
        description="Compare the methods of filling in by what they write and take (--table), or score the filling of "
        "stories by ROUGE (--stories) or of code by its tests (--humaneval).",
    )
    measure = parser.add_mutually_exclusive_group(required=True)
    measure.add_argument("--table", nargs="+", metavar="FILE", help="plain text, of which most is filled in")
    measure.add_argument("--stories", metavar="FILE", help="CSV of ROCStories or the Story Cloze Test")
    measure.add_argument("--humaneval", metavar="FILE", help="HumanEval infilling, .jsonl or .jsonl.gz")
    add_model(parser)
    add_law(parser)
    parser.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}; several for --table (default: {' '.join(FIXED_METHODS)}), one else (auto)",
    )
    parser.add_argument("--items", type=int, metavar="N", help="texts (default: 16), the first N stories or problems")
    parser.add_argument("--batch-size", type=int, metavar="N", help="texts at a time (default: 8; 1 for --table)")
    add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    table = parser.add_argument_group("the table")
    table.add_argument("--length", type=int, default=512, metavar="N", help="tokens of a text (default: 512)")
    table.add_argument("--prompt-fraction", type=float, default=0.05, metavar="X", help="given of it (default: 0.05)")
    table.add_argument("--judge", default="tiny-causal", metavar="DIR", help="causal model (default: tiny-causal)")
    stories = parser.add_argument_group("stories")
    stories.add_argument("--hidden", type=int, choices=[1, 3], default=1, help="of five sentences (default: 1)")
    stories.add_argument("--trials", type=int, default=1, metavar="N", help="fillings of a story (default: 1)")
    code = parser.add_argument_group("HumanEval infilling")
    code.add_argument("--gap-tokens", metavar="N", help="number or range (default: as many as the solution has)")
    code.add_argument("--samples", type=int, default=1, metavar="N", help="completions of a problem (default: 1)")
    code.add_argument("--output", metavar="FILE", help="write the completions as the benchmark's checker reads them")
    code.add_argument(
        "--execute",
        action="store_true",
        help="run each completion with its test: unread code of a model, with your rights; do it in a container",
    )
    code.add_argument("--timeout", type=float, default=5.0, metavar="S", help="seconds of a program (default: 5)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = law(args) | {"batch_size": args.batch_size or (1 if args.table else 8), "progress": not args.quiet}
    for name in ("items", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}")
    if not args.table and args.method and len(args.method) > 1:
        raise ValueError("--method: several are compared by --table alone; give one")
    check_json(args)
    with memory_in_words():
        if args.table:
            report, words, models = _table(args, options)
        else:
            options["method"] = args.method[0] if args.method else "auto"
            report, words, models = (_stories if args.stories else _code)(args, options)
    about = {"model": args.model, "seed": args.seed, "temperature": args.temperature}
    give(args, {**about, **report}, words, models)
    return 0


def _table(args: argparse.Namespace, options: dict[str, Any]) -> Found:
    from pyquiet.evaluation import generative_table
    from pyquiet.files import read_texts

    texts = read_texts(args.table)
    judge, words = load_causal("--judge", args.judge)
    model, tokenizer = _filler(args)
    table = generative_table(
        model,
        tokenizer,
        texts,
        (judge.to(args.device), words),
        methods=args.method or FIXED_METHODS,
        count=args.items or 16,
        length=args.length,
        prompt_fraction=args.prompt_fraction,
        **options,
    )
    report = {"text": args.table, "judge": args.judge, **table.to_dict()}
    given = f"{table.length - table.tokens} of {table.length} tokens given"
    head = f"{report['texts']} texts, {given}; judge {args.judge}; means +- standard errors"
    return report, f"{head}\n{table}", {"model": model, "judge": judge}


def _stories(args: argparse.Namespace, options: dict[str, Any]) -> Found:
    from pyquiet.evaluation import infill_stories, read_stories

    stories = read_stories(args.stories)[: args.items]
    model, tokenizer = _filler(args)
    scores = infill_stories(model, tokenizer, stories, hidden=args.hidden, trials=args.trials, **options)
    report = {"stories": args.stories, "hidden": args.hidden, "method": options["method"], **scores.to_dict()}
    return report, f"{scores}\n{cost_in_words(scores.cost)}", {"model": model}


def _code(args: argparse.Namespace, options: dict[str, Any]) -> Found:
    from pyquiet.evaluation import infill_code, read_code_problems
    from pyquiet.files import check_target, replacing
    from pyquiet.gaps import read_length

    target = check_target(args.output) if args.output else None
    lengths = read_length(args.gap_tokens) if args.gap_tokens else None
    problems = read_code_problems(args.humaneval)[: args.items]
    options |= {"lengths": lengths, "samples": args.samples, "execute": args.execute, "timeout": args.timeout}
    model, tokenizer = _filler(args)
    scores = infill_code(model, tokenizer, problems, **options)
    if target:
        with replacing(target) as file:
            pairs = zip(problems, scores.fillings, strict=True)
            lines = [{"task_id": problem.task_id, "completion": text} for problem, texts in pairs for text in texts]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = {"humaneval": args.humaneval, "method": options["method"], **scores.to_dict()}
    return report, f"{scores}\n{cost_in_words(scores.cost)}", {"model": model}


def _filler(args: argparse.Namespace) -> "tuple[Any, PreTrainedTokenizerBase]":
    device = usable_device(args.device)
    model, tokenizer = load_filler(args.model, args.tokenizer)
    return model.to(device), tokenizer
