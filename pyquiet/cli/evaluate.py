"""`pyquiet evaluate`: what a model's thoughts are worth, by token or question, how it fills in, what it writes."""

import argparse
from typing import TYPE_CHECKING, Any

from pyquiet.cli import evaluate_diffusion, evaluate_infilling, options
from pyquiet.cli.loading import load_thinker
from pyquiet.cli.reports import add_json, check_json, give
from pyquiet.cli.think import add_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pyquiet import QuietStarForCausalLM


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "evaluate",
        help="measure what thoughts are worth, how gaps are filled, or what diffusion writes",
        description="Measure what a model's thoughts are worth, how well it fills gaps, or what it writes by "
        "diffusion, and what that takes.",
        epilog="Besides: pyquiet scale report (test-time scaling), pyquiet bilevel demo (bilevel optimisation), and "
        "python -m pyquiet.evaluation.lm_eval --model pyquiet (tasks of lm-evaluation-harness).",
    )
    measures = options.add_commands(parser, "measures")
    _add_thoughts(measures)
    _add_answers(measures)
    evaluate_infilling.add_parser(measures)
    evaluate_diffusion.add_parser(measures)


def _add_thoughts(measures: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = measures.add_parser(
        "thoughts",
        help="the gain by thinking, from the easiest tokens of a text to the hardest",
        description="Print how much more probable thoughts make the tokens of a text, from the easiest tenth to the "
        "hardest.",
    )
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="plain text, one document a file")
    parser.add_argument("--max-tokens", type=options.Whole(), help="of each document (default: all)")
    parser.add_argument("--max-length", type=options.Whole(), help="tokens read at a time (default: 256 at most)")
    parser.add_argument(
        "--by",
        choices=["entropy", "loss"],
        default="entropy",
        help="difficulty: what the base expects to lose at a token, or does lose, which flatters",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the table to a .png, .svg or .pdf file")
    parser.add_argument("--html", metavar="FILE", help="write a page with every token, its thought on hover")
    parser.add_argument("--html-tokens", type=options.Whole(), default=5000, help="tokens on it")
    _add_common(parser, "texts", 8)
    parser.set_defaults(run=run_thoughts)


def _add_answers(measures: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = measures.add_parser(
        "answers",
        help="right answers to the questions of GSM8K or CommonsenseQA",
        description="Score direct answers with and without thoughts or, with --majority-vote, those reasoned aloud.",
    )
    parser.add_argument("--task", choices=["gsm8k", "commonsenseqa"], required=True, help="which benchmark")
    parser.add_argument("--data", required=True, metavar="FILE", help="the task's JSON lines")
    words = "the first ones, with --majority-vote of a shuffle (default: all, then 128)"
    parser.add_argument("--limit", type=options.Whole(), help=words)
    parser.add_argument("--think", choices=["both", "always", "never"], default="both", help="never: the plain model")
    parser.add_argument("--max-length", type=options.Whole(), default=256, help="tokens of question and answer")
    vote = parser.add_argument_group("majority vote (gsm8k)")
    vote.add_argument("--majority-vote", action="store_true", help="reason step by step, and count the answers")
    vote.add_argument("--num-samples", type=options.Whole(), default=8, help="votes on a question")
    options.add_temperature(vote, 0.9, "the votes")
    options.add_max_new_tokens(vote, 384)
    _add_common(parser, "texts", 16)
    parser.set_defaults(run=run_answers)


def _add_common(parser: argparse.ArgumentParser, what: str, batch_size: int) -> None:
    add_model(parser)
    options.add_thoughts_per_token(parser)
    options.add_seed(parser, "thoughts")
    options.add_batch_size(parser, what, batch_size)
    options.add_place(parser)
    add_json(parser)
    options.add_quiet(parser)


def run_thoughts(args: argparse.Namespace) -> int:
    from pyquiet.evaluation import opening_ids, thinking_gains, token_ids
    from pyquiet.files import check_target, read_texts
    from pyquiet.plotting import check_figure, plot_gain_by_decile, write_thoughts_page

    check_json(args)
    if args.plot:
        check_figure(args.plot)
    if args.html:
        check_target(args.html)
    texts = read_texts(args.text)
    model, tokenizer = _model(args)
    gains = thinking_gains(
        model,
        [token_ids(tokenizer, text)[: args.max_tokens] for text in texts],
        opening=opening_ids(tokenizer),
        max_length=args.max_length,
        **_options(args),
    )
    table = gains.table(args.by)
    report = {"model": args.model, "text": args.text, "by": args.by, "seed": args.seed, **table.to_dict()}
    give(args, report, f"base {args.by} and NLL in nats\n{table}", {"model": model})
    title = f"Thoughts on {', '.join(args.text)}"
    if args.plot:
        plot_gain_by_decile(table, args.plot, difficulty=f"base {args.by}", title=title)
    if args.html:
        write_thoughts_page(gains, tokenizer, args.html, by=args.by, title=title, limit=args.html_tokens)
    return 0


def run_answers(args: argparse.Namespace) -> int:
    from pyquiet.evaluation import TASKS, direct_answers, majority_vote

    if args.majority_vote and args.task != "gsm8k":
        raise ValueError("--majority-vote counts numbers: use it with --task gsm8k")
    check_json(args)
    task = TASKS[args.task]
    items = task.read(args.data)
    model, tokenizer = _model(args)
    think: Any = ("never", "always") if args.think == "both" else (args.think,)
    report: dict[str, Any] = {"model": args.model, "task": args.task, "seed": args.seed}
    if args.majority_vote:
        votes = {
            word: majority_vote(
                model,
                tokenizer,
                items,
                think=word,
                limit=args.limit or 128,
                num_samples=args.num_samples,
                temperature=args.temperature,
                max_new_tokens=args.max_new_tokens,
                **_options(args),
            )
            for word in think
        }
        report |= {word: vote.to_dict() for word, vote in votes.items()}
        words = "\n".join(f"{word:<7}{vote}" for word, vote in votes.items())
    else:
        chosen = items[: args.limit]
        scores = direct_answers(
            model, tokenizer, chosen, task.symbols, think=think, max_length=args.max_length, **_options(args)
        )
        report |= scores.to_dict()
        words = str(scores)
    give(args, report, words, {"model": model})
    return 0


def _model(args: argparse.Namespace) -> "tuple[QuietStarForCausalLM, PreTrainedTokenizerBase]":
    device = options.usable_device(args.device)
    model, tokenizer = load_thinker(args.model, None)
    model.to(device, options.dtype(args))
    return model, tokenizer


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "seed": args.seed,
        "thoughts_per_token": args.thoughts_per_token,
        "batch_size": args.batch_size,
        "progress": not args.quiet,
    }
