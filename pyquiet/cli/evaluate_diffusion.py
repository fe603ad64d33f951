"""`pyquiet evaluate diffusion`: what masked diffusion writes and what it takes, by sampler, energy and steps."""

import argparse

from pyquiet.cli.diffuse import (
    DEFAULT_CAUSAL,
    DEFAULT_MODEL,
    add_law,
    add_model,
    check_counts,
    law,
    load_causal,
    load_denoiser,
    load_energy,
)
from pyquiet.cli.infill import memory_in_words
from pyquiet.cli.reports import add_json, check_json, give
from pyquiet.cli.think import usable_device

ENERGIES = ("none", "ar", "tiny-energy")  # of the embedded denoiser
SAMPLERS = ("schedule_first", "ancestral", "cached", "first_hitting")  # of whole texts


def add_parser(measures: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = measures.add_parser(
        "diffusion",
        help="text written by masked diffusion: its quality and what it takes",
        description="Write texts from nothing by each sampler, energy and number of steps, and print what a judge, "
        "their entropy and n-grams say of them, what they took, and what each method takes to equal quality.",
    )
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="plain text to compare with")
    add_model(parser)
    parser.add_argument(
        "--energy",
        nargs="+",
        metavar="DIR",
        help=f"several of none, ar, embedded names, folders (default: {' '.join(ENERGIES)} for {DEFAULT_MODEL}, none "
        "for others)",
    )
    parser.add_argument(
        "--sampler",
        nargs="+",
        default=[SAMPLERS[0]],
        metavar="NAME",
        help=f"several of {', '.join(SAMPLERS)} (default: the first)",
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[8, 16, 32, 64], metavar="N", help="(8 16 32 64)")
    add_law(parser)
    parser.add_argument("--items", type=int, default=16, metavar="N", help="texts to write by each (default: 16)")
    parser.add_argument("--length", type=int, default=128, metavar="N", help="tokens of a text (default: 128)")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts at a time (default: 8)")
    parser.add_argument(
        "--judge",
        default=DEFAULT_CAUSAL,
        metavar="DIR",
        help=f"causal model, whose perplexity flatters texts that it was itself the energy of (default: "
        f"{DEFAULT_CAUSAL})",
    )
    parser.add_argument("--level", choices=["token", "character"], default="token", help="of n-grams (default: token)")
    parser.add_argument("--order", type=int, default=2, metavar="N", help="of the n-gram model (default: 2)")
    parser.add_argument(
        "--match",
        default="ngram_nll",
        metavar="QUALITY",
        help="perplexity, ngram_nll or variation_1, 2, 3, at the best value of which that all methods reach their "
        "costs are compared (default: ngram_nll)",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw that quality to a .png, .svg or .pdf file")
    add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pyquiet.evaluation.diffusion import QUALITIES, diffusion_table
    from pyquiet.files import read_texts
    from pyquiet.plotting import check_figure, plot_diffusion

    options, device = law(args), usable_device(args.device)
    check_counts(args, "items", "length", "batch_size", "order")
    if unknown := [name for name in args.sampler if name not in SAMPLERS]:
        raise ValueError(f"--sampler must be of {', '.join(SAMPLERS)}, got {unknown[0]!r}")
    if args.match not in QUALITIES:
        raise ValueError(f"--match must be one of {', '.join(QUALITIES)}, got {args.match!r}")
    if args.plot:
        check_figure(args.plot)
    check_json(args)
    texts = read_texts(args.text)
    denoiser, tokenizer = load_denoiser(args.model, args.tokenizer)
    denoiser.to(device)
    names = args.energy or (ENERGIES if args.model == DEFAULT_MODEL else ["none"])
    energies = {name: load_energy(name, denoiser, tokenizer) for name in names}
    judge, its_words = load_causal("--judge", args.judge)
    with memory_in_words():
        table = diffusion_table(
            denoiser,
            tokenizer,
            texts,
            (judge.to(device), its_words),
            energies=energies,
            samplers=args.sampler,
            steps=args.steps,
            count=args.items,
            length=args.length,
            level=args.level,
            order=args.order,
            batch_size=args.batch_size,
            progress=not args.quiet,
            **options,
        )
    matched = table.matched(args.match)
    about = {"model": args.model, "text": args.text, "judge": args.judge, **options}
    words = f"{args.items} texts of {args.length} tokens; judge {args.judge}; means +- standard errors"
    models = {
        f"energy {name}": getattr(energy, "lm", energy) for name, energy in energies.items() if energy is not None
    }
    models |= {"model": denoiser, "judge": judge}
    give(args, {**about, **table.to_dict(), "matched": matched.to_dict()}, f"{words}\n{table}\n\n{matched}", models)
    if args.plot:
        plot_diffusion(table, args.plot, quality=args.match)
    return 0
