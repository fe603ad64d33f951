"""`pyquiet bilevel`: optimisation of many small problems inside a large one."""

import argparse
from typing import Any

from pyquiet.cli.options import Number, Whole, add_commands, add_quiet, add_seed
from pyquiet.cli.reports import add_json, check_json, give


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    what = "optimise many small problems inside a large one"
    parser = commands.add_parser("bilevel", help=what, description=f"BSVRB: {what}.")
    actions = add_commands(parser, "actions")
    demo = actions.add_parser(
        "demo",
        help="find wrong labels by a few right ones",
        description="Turn over a share of the labels of a data set, and find them again: each training row gets a "
        "weight, learned so that logistic regressions on the weighed rows do well on a few clean ones.",
    )
    demo.add_argument("--data", default="digits", metavar="FILE", help="in LIBSVM's format, two classes")
    share = "of the training labels, turned over"
    demo.add_argument("--wrong", type=Number(0, 1), default=0.3, metavar="SHARE", help=share)
    demo.add_argument("--variant", choices=("v1", "v2"), default="v2", help="of BSVRB")
    demo.add_argument("--epochs", type=Whole(), default=60, help="passes over the training rows")
    rows = "training rows at most; a quarter of them more is clean"
    demo.add_argument("--rows", type=Whole(), default=4000, help=rows)
    add_seed(demo, "run")
    demo.add_argument("--plot", metavar="FILE", help="figure of curves and weights: .png, .svg or .pdf")
    add_json(demo)
    add_quiet(demo)
    demo.set_defaults(run=run_demo)


def run_demo(args: argparse.Namespace) -> int:
    from pyquiet.bilevel.demonstration import demonstrate, read_rows
    from pyquiet.plotting import check_figure
    from pyquiet.plotting.bilevel import plot_cleaning

    check_json(args)
    if args.plot:
        check_figure(args.plot)
    rows = read_rows(args.data)
    shown = demonstrate(
        *rows, wrong=args.wrong, rows=args.rows, variant=args.variant, epochs=args.epochs, seed=args.seed,
        progress=not args.quiet,
    )  # fmt: skip
    if args.plot:
        plot_cleaning(shown.cleaned, args.plot, wrong=shown.wrong, title=f"{args.data}, BSVRB {args.variant}")
    result = shown.to_dict() | {"data": args.data, "variant": args.variant, "seed": args.seed}
    give(args, result, _in_words(result))
    return 0


def _in_words(result: dict[str, Any]) -> str:
    auc = result["auc"]
    told = "there were not both wrong and right labels to tell apart"
    if auc is not None:
        told = f"wrong labels told from right ones with AUC {auc:.3f}"
    return (
        f"{result['rows']} rows, {result['wrong']} with a wrong label, {result['clean']} clean ones; "
        f"{result['steps']} steps in {result['seconds']:.1f} s\n"
        f"{told}\n"
        f"accuracy on the clean rows held out: {result['accuracy']:.3f} with the weights, "
        f"{result['plain_accuracy']:.3f} without, {result['clean_accuracy']:.3f} by the clean rows that weighed alone, "
        f"{result['oracle_accuracy']:.3f} on the right labels"
    )
