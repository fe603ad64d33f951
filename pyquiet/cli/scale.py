"""`pyquiet scale`: chains that a small model drafts, and a large one takes over at a promised rate."""

import argparse
import sys
from typing import TYPE_CHECKING

from pyquiet.cli import scale_report
from pyquiet.cli.options import (
    Number,
    Whole,
    add_place,
    add_quiet,
    add_seed,
    add_temperature,
    add_top,
    check_needed,
    dtype,
    stopped,
    usable_device,
)
from pyquiet.cli.reports import STANDARD_OUTPUT, add_json, check_json, give
from pyquiet.cli.scale_models import EMBEDDED, check_bank, embedded_file, model, settle_bank

if TYPE_CHECKING:
    from pyquiet.scaling import ATTS, ATTSResult, Plan
    from pyquiet.scaling.plan import OnTakeover


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "scale",
        help="scale thinking at test time with a small and a large model",
        description="Answer questions by several chains each: a draft model writes, the target model scores what it "
        "wrote and takes over where that is unusually bad, at a rate that is promised. Without models and questions "
        "the embedded pair answers embedded questions.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION")
    scale_report.add_parser(actions)
    where = "an embedded model, a folder, or addresses of servers of one model (http://host:port/v1,http://...#model)"
    for role, name in zip(("draft", "target"), EMBEDDED, strict=True):
        parser.add_argument(f"--{role}", default=name, metavar="MODEL", help=f"{where} (default: {name})")
        parser.add_argument(
            f"--{role}-tokenizer",
            metavar="NAME",
            help="of a model on servers: its name, folder, or an embedded model's name; chains then go as token ids",
        )
    parser.add_argument(
        "--questions", metavar="FILE", help="JSONL with question, and answer and id where there are any"
    )
    parser.add_argument("--limit", type=Whole(), help="of the questions, the first ones only")
    parser.add_argument(
        "--journal",
        metavar="FILE",
        help="keeps every step; given again, the run goes on from it (a calibration goes to FILE.calibration.jsonl)",
    )
    _add_promise(parser)
    _add_bank(parser)
    _add_chains(parser)
    add_place(parser.add_argument_group("models of this process"))
    add_json(parser)
    add_quiet(parser)
    parser.set_defaults(run=run)


def _add_promise(parser: argparse.ArgumentParser) -> None:
    promise = parser.add_argument_group("the promise", "how often the target model takes over")
    promise.add_argument(
        "--takeover-rate",
        type=Number(0, 1, open=True, below=True),
        default=0.4,
        metavar="RHO",
        help="share of drafts taken over",
    )
    promise.add_argument(
        "--discard-rate",
        type=Number(0, 1),
        default=0.0,
        metavar="RATE",
        help="of that share, the worst in this share of all drafts are thrown away and drafted again",
    )
    promise.add_argument(
        "--tail",
        choices=("budget", "coverage", "smoothed"),
        help="the rate holds at most, at least, exactly (default: budget)",
    )
    promise.add_argument(
        "--preset",
        choices=("paper",),
        help="the released settings: coverage, a pooled bank of first chunks, answers from rejected chunks",
    )
    promise.add_argument(
        "--on-takeover",
        choices=("continue", "replace", "resample"),
        help="behind the draft, in its place, or draft anew (default: continue; replace for the embedded pair)",
    )
    promise.add_argument(
        "--resamples", type=Whole(0), default=2, help="drafts of a turn that may be thrown away for another one"
    )


def _add_bank(parser: argparse.ArgumentParser) -> None:
    what = "earlier scores, among which that of a draft is ranked to decide whether the target takes over"
    bank = parser.add_argument_group("the bank", what)
    bank.add_argument("--calibration", metavar="DIR", help="bank that --save-calibration wrote")
    bank.add_argument("--calibrate", metavar="FILE", help="questions to calibrate on first, as --questions")
    bank.add_argument(
        "--calibrator",
        choices=("pooled", "hierarchical", "per_turn", "per_question", "online"),
        help="of --calibrate (default: per_turn); per_question: first chunks drafted for each question beforehand "
        "(default without --calibrate; the embedded pair brings a bank); online: one that grows with the run",
    )
    bank.add_argument("--calibration-chains", type=Whole(), default=4, help="of a question, for each turn")
    bank.add_argument(
        "--calibration-turns",
        type=Whole(),
        help="turns that get a bank and a promise each (default: banks for turns 0, 1, 2-3, 4-7, 8-)",
    )
    bank.add_argument(
        "--n-min", type=Whole(), help="fewer scores (questions, where those count) are no bank (default: 1)"
    )
    bank.add_argument(
        "--on-cold",
        default="takeover",
        choices=("takeover", "accept", "presample"),
        help="without a bank: call the target, keep the draft, or draft a bank for the question beforehand",
    )
    bank.add_argument(
        "--drift-level",
        type=Number(0, 1, open=True),
        metavar="P",
        help="watch for scores that leave the bank behind, with this probability of a false alarm (more where a small "
        "bank grows by several chains of a question)",
    )
    bank.add_argument(
        "--freeze-on-drift", action="store_true", help="at an alarm a bank that grows takes in nothing more"
    )
    bank.add_argument("--save-calibration", metavar="DIR", help="where the bank goes")


def _add_chains(parser: argparse.ArgumentParser) -> None:
    what = "answers to a question side by side, which vote; a chain is written in turns, each a chunk of text"
    chains = parser.add_argument_group("the chains", what)
    chains.add_argument("--chains", type=Whole(), default=16, metavar="M", help="of a question")
    chains.add_argument("--turns", type=Whole(), default=15, metavar="T", help="of a chain at most")
    chains.add_argument(
        "--draft-tokens", type=Whole(), help="of a draft at most (default: 500; 48 for the embedded pair)"
    )
    chains.add_argument(
        "--target-tokens", type=Whole(), help="of a takeover at most (default: 500; 48 for the embedded pair)"
    )
    add_temperature(chains, 0.8, "both models")
    add_top(chains)
    chains.add_argument(
        "--stop", action="append", metavar="TEXT", help=r"ends a chunk (\n for a newline); may be given again"
    )
    chains.add_argument("--system", metavar="TEXT", help="system message, where a chat template takes one")
    chains.add_argument(
        "--template",
        metavar="TEXT",
        help="how a question is shown, with {question} (default: the chat template, else the question and a newline)",
    )
    chains.add_argument(
        "--select",
        default="majority",
        choices=("majority", "weighted", "first"),
        help="which answer wins: most votes, votes weighted by score, or that of the first chain to end",
    )
    chains.add_argument("--early-majority", action="store_true", help="cancel chains that cannot change the winner")
    chains.add_argument(
        "--engine",
        default="async",
        choices=("async", "sync"),
        help="sync waits for all chains of a turn",
    )
    chains.add_argument(
        "--slots",
        metavar="D,S,T",
        help="requests at once: drafting, scoring, continuing (default: 16,8,4 where a server is asked, else 64 each)",
    )
    chains.add_argument("--inflight", type=Whole(), default=64, help="chains at once")
    add_seed(chains, "draws")


def run(args: argparse.Namespace) -> int:
    from pyquiet.scaling.backends.base import BackendError

    try:
        return _run(args)
    except BackendError as error:  # a server that refuses or stays away; the input is well
        print(f"pyquiet: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    from pyquiet.cli.scale_live import watching
    from pyquiet.scaling.questions import read_questions

    check_json(args)
    check_bank(args)
    embedded = (args.draft, args.target) == EMBEDDED
    questions = read_questions(args.questions or embedded_file("questions.jsonl"))[: args.limit]
    atts = _build(args, embedded)
    answers = {question.id: question.answer for question in questions if question.answer is not None}
    quiet = args.quiet or args.json == STANDARD_OUTPUT
    rate = args.takeover_rate
    bank = settle_bank(atts, args, lambda title, chains: watching(title, chains, rate, {}, quiet=quiet))
    with watching("answering", len(questions) * atts.plan.chains, rate, answers, quiet=quiet) as on_record:
        result = atts.run(questions, journal=args.journal, engine=args.engine, on_record=on_record)
    report = result.report
    guaranteed = {turn: {"guaranteed": sure, "why": why} for turn, (sure, why) in result.guaranteed.items()}
    shown = {"answers": result.answers, "bank": bank, "guaranteed": guaranteed, "report": report.to_dict()}
    models = {role: getattr(getattr(atts, role), "model", None) for role in ("draft", "target")}  # None: of a server
    give(args, shown | {"finished": result.finished}, _in_words(result, bank), models)
    return _status(result, args.journal)


def _status(result: "ATTSResult", journal: str | None) -> int:
    """The command's exit status: 130 after Ctrl-C, 1 if no chain came to an end of its own."""
    outcomes = result.report.outcomes
    if result.finished and outcomes.get("failed") and outcomes.keys() == {"failed"}:
        print("pyquiet: error: every chain failed: its requests were given up; see to the servers", file=sys.stderr)
        return 1
    return 0 if result.finished else stopped(journal)


def _build(args: argparse.Namespace, embedded: bool) -> "ATTS":
    from pyquiet.scaling import ATTS, DriftMonitor

    if args.drift_level is None:
        check_needed(args, "--drift-level", "freeze_on_drift")
    plan = _plan(args, embedded)
    on_takeover: OnTakeover = args.on_takeover or ("replace" if embedded else "continue")
    place = usable_device(args.device), dtype(args)
    draft, target = (
        model(role, getattr(args, role), getattr(args, f"{role}_tokenizer"), *place) for role in ("draft", "target")
    )
    return ATTS(
        draft, target, takeover_rate=args.takeover_rate, tail=args.tail, preset=args.preset, on_takeover=on_takeover,
        calibration=args.calibration, plan=plan, template=args.template, system=args.system,
        select=args.select, discard_rate=args.discard_rate, resamples=args.resamples, on_cold=args.on_cold,
        drift=None if args.drift_level is None else DriftMonitor(args.drift_level, args.freeze_on_drift),
    )  # fmt: skip


def _plan(args: argparse.Namespace, embedded: bool) -> "Plan":
    from pyquiet.scaling import Plan, Pools, Sampling

    served = any(name.startswith("http") for name in (args.draft, args.target))
    # In this process what waits fills batches; a server has slots of its own.
    slots = (args.slots or ("16,8,4" if served else "64,64,64")).split(",")
    if len(slots) != 3 or not all(slot.strip().isdigit() and int(slot) for slot in slots):
        raise ValueError(f"--slots must be three numbers from 1 on with commas between, got {args.slots!r}")
    draft, score, target = map(int, slots)
    short = 48 if embedded else 500  # a line of the embedded pair has 25 tokens at most
    stop = [text.replace("\\n", "\n") for text in args.stop or (["\\n"] if embedded else [])]
    law = args.temperature, args.top_p or 1.0, args.top_k
    return Plan(
        chains=args.chains,
        turns=args.turns,
        draft=Sampling(args.draft_tokens or short, *law),
        target=Sampling(args.target_tokens or short, *law),
        stop=tuple(stop),
        early_majority=args.early_majority,
        pools=Pools(draft, score, target, args.inflight),
        seed=args.seed,
    )


def _in_words(result: "ATTSResult", bank: str) -> str:
    lines = [f"{q.question.id}: {q.answer if q.answer is not None else '(no answer)'}" for q in result.questions]
    lines += ["", str(result.report), f"bank: {bank}", ""]
    for turn, (sure, why) in result.guaranteed.items():
        lines.append(f"turn {turn}: {'the rate is guaranteed' if sure else 'no guarantee'}: {why}")
    return "\n".join(lines)
