"""`pyquiet evaluate infilling`: what filling in gives and takes, how well stories and code are filled."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from pyquiet.any_subset.sampling import FIXED_METHODS, METHODS
from pyquiet.cli import options
from pyquiet.cli.infill import add_law, add_model, cost_in_words, law
from pyquiet.cli.loading import CAUSAL, load_causal, load_filler
from pyquiet.cli.reports import add_json, check_json, give, memory_in_words

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
    words = "texts of a table (default: 16), or the first stories or problems"
    parser.add_argument("--limit", type=options.Whole(), help=words)
    words = "fillings of a story, completions of a problem (default: 1)"
    parser.add_argument("--num-samples", type=options.Whole(), help=words)
    words = "texts at a time (default: 8; 1 for --table)"
    parser.add_argument("--batch-size", type=options.Whole(), help=words)
    add_json(parser)
    options.add_quiet(parser)
    table = parser.add_argument_group("the table")
    table.add_argument("--length", type=options.Whole(), default=512, help="tokens of a text")
    table.add_argument("--prompt-fraction", type=options.Number(0, 1, below=True), default=0.05, help="given of it")
    table.add_argument("--judge", default=CAUSAL, metavar="DIR", help="causal model, whose perplexity is shown")
    stories = parser.add_argument_group("stories")
    stories.add_argument(
        "--hidden", type=int, choices=[1, 3], default=1, help="sentences to fill in, of a story's five"
    )
    code = parser.add_argument_group("HumanEval infilling")
    code.add_argument("--gap-tokens", metavar="N", help="number or range (default: as many as the solution has)")
    code.add_argument("--output", metavar="FILE", help="write the completions as the benchmark's checker reads them")
    code.add_argument(
        "--execute",
        action="store_true",
        help="run each completion with its test: unread code of a model, with your rights; do it in a container",
    )
    words = "seconds of a program"
    code.add_argument("--timeout", type=options.Number(0, open=True), default=5.0, help=words)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    how = law(args) | {"batch_size": args.batch_size or (1 if args.table else 8), "progress": not args.quiet}
    if not args.humaneval:
        options.check_needed(args, "--humaneval", "gap_tokens", "output", "execute")
    if args.table:
        options.check_needed(args, "--stories or --humaneval", "num_samples")
    if not args.table and args.method and len(args.method) > 1:
        raise ValueError("--method: several are compared by --table alone; give one")
    check_json(args)
    with memory_in_words():
        if args.table:
            report, words, models = _table(args, how)
        else:
            how |= {"method": args.method[0] if args.method else "auto", "num_samples": args.num_samples or 1}
            report, words, models = (_stories if args.stories else _code)(args, how)
    about = {"model": args.model, "seed": args.seed, "temperature": args.temperature}
    give(args, {**about, **report}, words, models)
    return 0


def _table(args: argparse.Namespace, how: dict[str, Any]) -> Found:
    from pyquiet.evaluation import generative_table
    from pyquiet.files import read_texts

    texts = read_texts(args.table)
    model, tokenizer = _filler(args)
    judge, words = load_causal("--judge", args.judge)
    table = generative_table(
        model,
        tokenizer,
        texts,
        (judge.to(model.device), words),
        methods=args.method or FIXED_METHODS,
        limit=args.limit or 16,
        length=args.length,
        prompt_fraction=args.prompt_fraction,
        **how,
    )
    report = {"text": args.table, "judge": args.judge, **table.to_dict()}
    given = f"{table.length - table.tokens} of {table.length} tokens given"
    head = f"{report['texts']} texts, {given}; judge {args.judge}; means +- standard errors"
    return report, f"{head}\n{table}", {"model": model, "judge": judge}


def _stories(args: argparse.Namespace, how: dict[str, Any]) -> Found:
    from pyquiet.evaluation import infill_stories, read_stories

    stories = read_stories(args.stories)[: args.limit]
    model, tokenizer = _filler(args)
    scores = infill_stories(model, tokenizer, stories, hidden=args.hidden, **how)
    report = {"stories": args.stories, "hidden": args.hidden, "method": how["method"], **scores.to_dict()}
    return report, f"{scores}\n{cost_in_words(scores.cost)}", {"model": model}


def _code(args: argparse.Namespace, how: dict[str, Any]) -> Found:
    from pyquiet.evaluation import infill_code, read_code_problems
    from pyquiet.files import check_target, replacing
    from pyquiet.gaps import read_length

    target = check_target(args.output) if args.output else None
    lengths = read_length(args.gap_tokens, "gap_tokens") if args.gap_tokens else None
    problems = read_code_problems(args.humaneval)[: args.limit]
    how |= {"lengths": lengths, "execute": args.execute, "timeout": args.timeout}
    model, tokenizer = _filler(args)
    scores = infill_code(model, tokenizer, problems, **how)
    if target:
        with replacing(target) as file:
            pairs = zip(problems, scores.fillings, strict=True)
            lines = [{"task_id": problem.task_id, "completion": text} for problem, texts in pairs for text in texts]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = {"humaneval": args.humaneval, "method": how["method"], **scores.to_dict()}
    return report, f"{scores}\n{cost_in_words(scores.cost)}", {"model": model}


def _filler(args: argparse.Namespace) -> "tuple[Any, PreTrainedTokenizerBase]":
    device = options.usable_device(args.device)
    model, tokenizer = load_filler(args.model, args.tokenizer)
    return model.to(device, options.dtype(args)), tokenizer
