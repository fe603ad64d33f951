"""`pyquiet evaluate diffusion`: what masked diffusion writes and what it takes, by sampler, energy and steps."""

import argparse

from pyquiet.cli import options
from pyquiet.cli.diffuse import add_law, add_model, law
from pyquiet.cli.loading import CAUSAL, DENOISER, load_causal, load_denoiser, load_energy, network
from pyquiet.cli.reports import add_json, check_json, give, memory_in_words

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
        help=f"several of none, ar, embedded names, folders (default: {' '.join(ENERGIES)} for {DENOISER}, none for "
        "others)",
    )
    words = f"several of {', '.join(SAMPLERS)}"
    parser.add_argument("--sampler", nargs="+", choices=SAMPLERS, default=[SAMPLERS[0]], metavar="NAME", help=words)
    words = "from blanks to the whole text, several"
    parser.add_argument("--steps", nargs="+", type=options.Whole(), default=[8, 16, 32, 64], help=words)
    add_law(parser, temperature=1.0)
    parser.add_argument("--num-samples", type=options.Whole(), default=16, help="texts to write by each")
    parser.add_argument("--length", type=options.Whole(), default=128, help="tokens of a text")
    options.add_batch_size(parser, "texts", 8)
    parser.add_argument(
        "--judge",
        default=CAUSAL,
        metavar="DIR",
        help="causal model, whose perplexity is shown; it flatters texts that it was itself the energy of",
    )
    parser.add_argument("--level", choices=["token", "character"], default="token", help="of n-grams")
    parser.add_argument("--order", type=options.Whole(), default=2, help="of the n-gram model")
    parser.add_argument(
        "--match",
        default="ngram_nll",
        metavar="QUALITY",
        help="perplexity, ngram_nll or variation_1, 2, 3, at the best value of which that all methods reach their "
        "costs are compared",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw that quality to a .png, .svg or .pdf file")
    add_json(parser)
    options.add_quiet(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pyquiet.evaluation.diffusion import QUALITIES, diffusion_table
    from pyquiet.files import read_texts
    from pyquiet.plotting import check_figure, plot_diffusion

    device = options.usable_device(args.device)
    if args.match not in QUALITIES:
        raise ValueError(f"--match must be one of {', '.join(QUALITIES)}, got {args.match!r}")
    if args.plot:
        check_figure(args.plot)
    check_json(args)
    texts = read_texts(args.text)
    denoiser, tokenizer = load_denoiser(args.model, args.tokenizer)
    denoiser.to(device, options.dtype(args))
    names = args.energy or (ENERGIES if args.model == DENOISER else ["none"])
    energies = {name: load_energy(name, denoiser, tokenizer, options.dtype(args)) for name in names}
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
            num_samples=args.num_samples,
            length=args.length,
            level=args.level,
            order=args.order,
            batch_size=args.batch_size,
            progress=not args.quiet,
            **law(args),
        )
    matched = table.matched(args.match)
    about = {"model": args.model, "text": args.text, "judge": args.judge, **law(args)}
    words = f"{args.num_samples} texts of {args.length} tokens; judge {args.judge}; means +- standard errors"
    models = {f"energy {name}": network(energy) for name, energy in energies.items()}
    models |= {"model": denoiser, "judge": judge}
    give(args, {**about, **table.to_dict(), "matched": matched.to_dict()}, f"{words}\n{table}\n\n{matched}", models)
    if args.plot:
        plot_diffusion(table, args.plot, quality=args.match)
    return 0
