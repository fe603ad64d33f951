"""`pyquiet demo`: the five systems at work on the embedded models."""

import argparse
import shutil
import textwrap

from pyquiet.cli import options
from pyquiet.cli.reports import STANDARD_OUTPUT, add_json, check_json, give
from pyquiet.demo import FIGURES, SCENES, Scene


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "demo",
        help="see all five systems at work, in about a minute",
        description="Play all five systems on the embedded models, offline: each with what it shows and its numbers "
        "beside the plain alternative's, all measured in this run.",
    )
    words = f"some of {', '.join(SCENES)} (default: all)"
    parser.add_argument("--only", nargs="+", choices=SCENES, default=SCENES, metavar="SCENE", help=words)
    options.add_seed(parser, "texts")
    parser.add_argument("--html", metavar="FILE", help="write a page with what there is to look at")
    add_json(parser)
    options.add_quiet(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pyquiet.demo import play
    from pyquiet.files import check_target
    from pyquiet.plotting import write_page
    from pyquiet.plotting.figures import check_matplotlib
    from pyquiet.zoo import load

    check_json(args)
    if args.html:
        check_target(args.html)
        if not set(FIGURES).isdisjoint(args.only):
            check_matplotlib()
    scenes, speaks = [], args.json != STANDARD_OUTPUT
    for name, scene, seconds in play(args.only, seed=args.seed, progress=not args.quiet):
        scenes.append((name, scene, seconds))
        if speaks:  # as they come
            print(f"{in_lines(scene)}\n  ({seconds:.1f} s)\n", flush=True)
    if args.html:
        write_page(args.html, "pyquiet", [scene.section() for _, scene, _ in scenes], words=f"{LEAD} Seed {args.seed}.")
    found = {name: {**scene.to_dict(), "seconds": seconds} for name, scene, seconds in scenes}
    whole = sum(seconds for _, _, seconds in scenes)
    page = f", {args.html} has what there is to look at" if args.html else ""
    models = dict.fromkeys(model for _, scene, _ in scenes for model in scene.models) if args.json is not None else ()
    report = {"seed": args.seed, "scenes": found}
    give(args, report, f"{whole:.0f} s in all{page}", {model: load(model)[0] for model in models})
    return 0


def in_lines(scene: Scene) -> str:
    """The scene's title, what it shows and what was found, no wider than the terminal."""
    width = max(40, min(100, shutil.get_terminal_size((100, 24)).columns))

    def lines(words: str, mark: str) -> str:
        return textwrap.fill(words, width, initial_indent=f"  {mark}", subsequent_indent=" " * (2 + len(mark)))

    return "\n".join(
        [scene.title, lines(scene.shows, ""), lines(scene.found, "> "), *(lines(x, "  ") for x in scene.more)]
    )


LEAD = (
    "Five ways to get more out of a language model, each at work on small models that come with the package, and "
    "beside its plain alternative. Every number and picture on this page was made by one run of pyquiet demo. A token "
    "is a word or a piece of one; nats measure surprise: a nat less is 2.7 times as probable. What is not above twice "
    "its error (+-) may be chance."
)
